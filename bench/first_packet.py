"""What the first packet of a connection costs its sender: the time of one sendto(), with a new socket for each.

    python -m bench.first_packet ADDRESS PORT COUNT    prints the median and the 99th percentile, in microseconds

A datagram that the node itself sends passes the rules of OUTPUT, and the way to the device, before sendto() returns, so
nobody has to answer. A socket that is new makes a connection that is new. Meant for a namespace with rules in it and a
device that leads away; `flat` is what to compare a tree with.
"""

from __future__ import annotations

import socket
import statistics
import sys
import time
from collections.abc import Iterable

from kube_proxy_lite.model import PortPlan, Settings
from kube_proxy_lite.render.iptables_chains import SERVICES, entries, hooks, service_chains, shared_chains
from kube_proxy_lite.render.iptables_tree import WORDS
from kube_proxy_lite.render.nftables_elements import address_text


def measure(address: str, port: int, count: int) -> tuple[float, float]:
    """The median and the 99th percentile of `count` first packets, in microseconds, after a tenth more."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    taken = []
    for _ in range(count + count // 10):
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            began = time.perf_counter_ns()
            sender.sendto(b"?", (address, port))
            taken.append((time.perf_counter_ns() - began) / 1000)
    taken = taken[count // 10 :]
    return statistics.median(taken), statistics.quantiles(taken, n=100)[98]


def flat(plans: Iterable[PortPlan], settings: Settings, version: int) -> Iterable[str]:
    """Texts for iptables-restore: the same chains, and KUBE-SERVICES as the one list that kube-proxy makes of it.

    ClusterIPs alone. In pieces, since iptables-nft takes time by the square of what it is given at once.
    """
    plans = tuple(plans)
    shared = shared_chains(settings, version)["nat"]
    yield _restore(shared | {"KUBE-SERVICES": ()}, [])
    for start in range(0, len(plans), 200):
        some = plans[start : start + 200]
        listed = []
        for plan in some:
            word = WORDS[plan.key.protocol]
            for (board, _, _, port), (_, jump) in entries(plan, settings):
                if board == SERVICES:
                    host = address_text(plan.frontends[0].address) if plan.frontends[0].address else ""
                    listed.append(f"-A KUBE-SERVICES -d {host} -p {word} -m {word} --dport {port} {jump}")
        chains = {name: rules for plan in some for name, rules in service_chains(plan, settings)["nat"].items()}
        yield _restore(chains, listed)
    jumps = [f"-I {chain} {rule}" for (table, chain), rules in hooks().items() if table == "nat" for rule in rules]
    yield _restore({}, jumps)


def _restore(chains: dict[str, tuple[str, ...]], more: list[str]) -> str:
    declared = [f":{name} - [0:0]" for name in chains]
    lines = [f"-A {name} {rule}" for name, rules in chains.items() for rule in rules]
    return "\n".join(["*nat", *declared, *lines, *more, "COMMIT", ""])


if __name__ == "__main__":
    median, slowest = measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(f"{median:.2f} {slowest:.2f}")
