"""Benchmarks: what Podwire costs on this machine, beside what the reference costs on it. `python -m bench`, as root.

    scenarios/    one module each: what is run, what is asked of it (its bounds), what table it makes
    stage.py      nodes and pods made of network namespaces, removed again whatever happens
    podwire_node  a node with the real etcd, the real daemon and the real executable
    reference     a node with Debian's reference plugins
    contender.py  ADD and DEL of either, by the same path, each checked to have done what it says
    crowd.py      thousands of other nodes, as one node sees them: records in its etcd, routes in its kernel
    wires.py      two nodes with pods, by Podwire and by hand; pingpong.py goes to and fro between them
    proxy_node    a node with the real proxy, between a client and all pods of a cluster (backends)
    synthetic_api a Kubernetes API of thousands of objects (objects), and of changes to them
    modelling     what the proxy makes of them before the kernel hears of it
    hand_rules    Services and policies as others lay them out (pure)
    process.py    one plugin process, timed
    statistic.py  medians, percentiles, ratios with their uncertainty (pure)
    report.py     tables, bounds, the regions of docs/performance.md (pure)

What is compared runs alternately, in an order that rotates, so that a machine that is busy is busy for all. Numbers
are reported and never asserted: only a call that did not do its work fails a benchmark. Nothing of the machine's own
network is touched. docs/performance.md says what each number means.
"""
