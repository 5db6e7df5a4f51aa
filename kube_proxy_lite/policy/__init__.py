"""NetworkPolicy: what it means, which pods it is about, and what this node's kernel should be told. Pure.

objects ──▶ rules      a policy, compiled: whom it isolates, which peers and ports it opens
        ──▶ policies   pods, namespaces and policies together: classes, sets, and which address is in which
        ──▶ evaluate   (flow) → verdict and the rule that decided, from the same state
"""
