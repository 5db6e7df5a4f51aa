"""Who may reach whom, and by which way: the answers of `podwire policy` and `podwire explain`.

    manifests ──▶ manifests ─┐                 ┌─▶ verdict    one question: allowed or denied, and who decided
                             ├─▶ Objects ─▶ Cluster ─▶ matrix     all pods by all pods; as text, SVG and HTML
    API ────────▶ live ──────┘                 └─▶ path       hop by hop, compared with what the kernel says (`reading`)

What a policy means is asked of kube_proxy_lite.policy.evaluate, and what becomes of a connection to a Service of
kube_proxy_lite.model.decide: the proxy and this package cannot disagree. `live` and `reading` do I/O, all else is pure.
"""
