"""The lab: a Kubernetes cluster of network namespaces on one Linux machine, in seconds, without Docker or images.

    machine ── podwire lab up ──▶ supervisor (API server, scheduler, kubelets)
                                        │ runs things in
       ┌─ pw.<lab>.underlay ────────────┼──────────────────────────────────────────┐
       │  bridge, MTU 1500              ▼                                          │
       └──┬───────────┬──────────────┬──────────────┬──────────────┬───────────────┘
      .control     .node1         .node2         .node3         .outside
      etcd, API    ipamd, pw0     ipamd, pw0     ipamd, pw0     a host that is no node
                   └ .pod.<ns>.<name> …

What is real: the kernel, etcd, the daemon, the CNI executable and how it is called. What is stood in for: the API
server (podwire.lab.api), the scheduler, and the kubelet with its runtime, which start processes of this machine in
the pods' namespaces. Nothing of the machine's own network is touched, so that several labs run side by side.

Modules, from the ground up: `names` (what everything is called, pure), `state` (what `down` must know, on disk before a
thing exists), `process` (detached processes and how they are found again), `topology` (namespaces and links), `node` (a
node's mount namespace, daemon and configuration), `cni` (libcni's job), `container` and `kubelet` (pods), `supervisor`
(the process that holds the control plane), `cluster` (up and down), `status`, `demo`.
"""
