"""Dispatch by address and port as trees of chains, so that no packet walks a list as long as the cluster. Pure.

    KUBE-SERVICES ── -d 10.96.0.0/12 ──▶ KUBE-IP-… ── -d 10.96.64.0/18 ──▶ KUBE-IP-… ── the rules of 8 addresses

Keys are numbers (addresses, ports), sorted. A node is all keys with a common beginning, four bits at a time: up to
`LEAF` keys are listed, more are divided by their next four bits, and a part of one key is listed in place of a chain.
So a packet meets 20 to 40 rules among 5,000 Services, and one for nobody leaves at the root.

**The tree has no memory.** Which chains there are, and what they say, follows from the set of keys alone. A change of
some keys touches the nodes that hold them and those nodes' children (`chains` with `touched`), before it and after: all
others are the same in both trees. That makes a change cost the logarithm of what there is, without an object a node.

Rules are written as iptables-save prints them.
"""

from __future__ import annotations

import hashlib
import ipaddress
from abc import ABC, abstractmethod
from base64 import b32encode
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator
from functools import partial

from kube_proxy_lite.model import Protocol
from kube_proxy_lite.render.nftables_elements import address_text

BITS = 4
LEAF = 8
Rules = tuple[str, ...]
Chains = dict[str, Rules]
"""Chain → rules, with chains that are referred to before those that refer to them."""
Parts = dict[str, Rules | Callable[[], Rules]]
"""The same, where rules may be what makes them when they are asked for."""
Target = tuple[str, str]
"""What a rule says of whom it is for, and where it leads: comment, `-j CHAIN`."""
WORDS = {Protocol.TCP: "tcp", Protocol.UDP: "udp", Protocol.SCTP: "sctp"}


def name_of(prefix: str, *parts: str) -> str:
    """A chain's name: the prefix and 16 characters, in which 80 bits of a hash are."""
    return prefix + b32encode(hashlib.sha256("".join(parts).encode()).digest())[:16].decode()


class Tree(ABC):
    """Sorted keys of `width` bits, divided."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.keys: list[int] = []

    @abstractmethod
    def rules(self, key: int) -> Rules:
        """The rules of one key."""

    @abstractmethod
    def chain(self, prefix: int, length: int) -> str:
        """The name of the chain for keys that begin with the `length` bits of `prefix`."""

    @abstractmethod
    def match(self, prefix: int, length: int) -> str:
        """What a rule must match to be for those keys; ends in a blank unless it is empty."""

    def below(self, key: int) -> Parts:  # noqa: ARG002
        """Chains that the rules of one key lead to."""
        return {}

    def add(self, key: int) -> None:
        """One key more."""
        insort(self.keys, key)

    def remove(self, key: int) -> None:
        """One key fewer."""
        del self.keys[bisect_left(self.keys, key)]

    def root(self) -> tuple[str, str] | None:
        """(match, chain) of the whole; None when it is empty."""
        if not self.keys:
            return None
        prefix, length = self._prefix(0, len(self.keys))
        return self.match(prefix, length), self.chain(prefix, length)

    def chains(self, touched: Collection[int] | None = None) -> Parts:
        """All chains; given `touched`, those that hold one of these keys, and the chains that these lead to.

        Of the latter there is what would make their rules: they are asked for where such a chain is new.
        """
        found: Parts = {}
        if self.keys:
            self._visit(0, len(self.keys), None if touched is None else sorted(touched), found)
        return found

    def _visit(self, low: int, high: int, touched: list[int] | None, found: Parts) -> None:
        prefix, length = self._prefix(low, high)
        if touched is not None:
            shift = self.width - length
            first, last = bisect_left(touched, prefix << shift), bisect_left(touched, (prefix + 1) << shift)
            touched = touched[first:last]
        for start, end in self._parts(low, high) if touched is None or touched else ():
            if end - start > 1:
                if touched is None or self._holds(start, end, touched):
                    self._visit(start, end, touched, found)
                else:
                    found[self.chain(*self._prefix(start, end))] = partial(self._rules, start, end)
            elif touched is None or self.keys[start] in touched:
                found.update(self.below(self.keys[start]))
        found[self.chain(prefix, length)] = self._rules(low, high)

    def _rules(self, low: int, high: int) -> Rules:
        rules: list[str] = []
        for start, end in self._parts(low, high):
            if end - start == 1:
                rules += self.rules(self.keys[start])
            else:
                child = self._prefix(start, end)
                rules.append(f"{self.match(*child)}-g {self.chain(*child)}")
        return tuple(rules)

    def _holds(self, low: int, high: int, touched: list[int]) -> bool:
        """Whether one of `touched` begins as keys[low:high] do."""
        prefix, length = self._prefix(low, high)
        shift = self.width - length
        at = bisect_left(touched, prefix << shift)
        return at < len(touched) and touched[at] >> shift == prefix

    def _prefix(self, low: int, high: int) -> tuple[int, int]:
        """What keys[low:high] have in common, in steps of BITS: the number that it is, and its length."""
        differing = (self.keys[low] ^ self.keys[high - 1]).bit_length()
        shift = -(-differing // BITS) * BITS
        return self.keys[low] >> shift, self.width - shift

    def _parts(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        if high - low <= LEAF:
            yield from ((at, at + 1) for at in range(low, high))
            return
        _, length = self._prefix(low, high)
        shift = self.width - length - BITS
        start = low
        while start < high:
            end = bisect_left(self.keys, ((self.keys[start] >> shift) + 1) << shift, start, high)
            yield start, end
            start = end


class PortTree(Tree):
    """The ports of one protocol: of an address, or of the node."""

    def __init__(self, seed: str, protocol: Protocol) -> None:
        super().__init__(16)
        self.targets: dict[int, Target] = {}
        self._seed = seed
        self._protocol = WORDS[protocol]

    def rules(self, key: int) -> Rules:
        return (port_rule("", self._protocol, key, self.targets[key]),)

    def chain(self, prefix: int, length: int) -> str:
        return name_of("KUBE-PORT-", self._seed, self._protocol, f" {prefix << 16 - length}/{length}")

    def match(self, prefix: int, length: int) -> str:
        if not length:
            return f"-p {self._protocol} "
        first = prefix << 16 - length
        last = first + (1 << 16 - length) - 1
        ports = f"{first}:{last}" if first != last else f"{first}"
        return f"-p {self._protocol} -m {self._protocol} --dport {ports} "


class Ports:
    """The ports of an address, or of the node, of all protocols, and where they lead."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self.trees: dict[Protocol, PortTree] = {}

    def __len__(self) -> int:
        return sum(len(tree.keys) for tree in self.trees.values())

    def set(self, protocol: Protocol, port: int, target: Target | None) -> None:
        """A port, None when it leads nowhere any more."""
        tree = self.trees.get(protocol)
        if tree is None:
            tree = self.trees[protocol] = PortTree(self._seed, protocol)
        if target is None:
            del tree.targets[port]
            tree.remove(port)
            return
        if port not in tree.targets:
            tree.add(port)
        tree.targets[port] = target

    def rules(self, match: str) -> Rules:
        """One rule a port."""
        return tuple(
            port_rule(match, WORDS[protocol], port, tree.targets[port])
            for protocol, tree in sorted(self.trees.items())
            for port in tree.keys
        )

    def entries(self) -> Rules:
        """The rules that lead into the trees."""
        roots = (tree.root() for _, tree in sorted(self.trees.items()))
        return tuple(f"{match}-g {chain}" for match, chain in filter(None, roots))

    def chains(self, touched: Collection[tuple[Protocol, int]] | None = None) -> Parts:
        """As Tree.chains."""
        found: Parts = {}
        for protocol, tree in self.trees.items():
            keys = None if touched is None else {port for each, port in touched if each is protocol}
            if keys is None or keys:
                found.update(tree.chains(keys))
        return found


class AddressTree(Tree):
    """Addresses, each with its ports. An address of more ports than a leaf has room for has a tree of its own."""

    def __init__(self, seed: str, version: int) -> None:
        super().__init__(32 if version == 4 else 128)
        self._seed = seed
        self._address = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
        self._ports: dict[int, Ports] = {}

    def set(self, address: int, protocol: Protocol, port: int, target: Target | None) -> None:
        """A place, None when it leads nowhere any more."""
        ports = self._ports.get(address)
        if ports is None:
            ports = self._ports[address] = Ports(f"{self._seed} {address}")
            self.add(address)
        ports.set(protocol, port, target)
        if not len(ports):
            del self._ports[address]
            self.remove(address)

    def rules(self, key: int) -> Rules:
        match, ports = self.match(key, self.width), self._ports[key]
        if len(ports) > LEAF:
            return (f"{match}-g {self._own_chain(key)}",)
        return ports.rules(match)

    def below(self, key: int) -> Parts:
        ports = self._ports[key]
        if len(ports) <= LEAF:
            return {}
        return ports.chains() | {self._own_chain(key): ports.entries()}

    def chain(self, prefix: int, length: int) -> str:
        return name_of("KUBE-IP-", self._seed, f" {prefix << self.width - length}/{length}")

    def match(self, prefix: int, length: int) -> str:
        if not length:
            return ""
        return f"-d {address_text(self._address(prefix << self.width - length))}/{length} "

    def _own_chain(self, key: int) -> str:
        return name_of("KUBE-PORT-", self._seed, f" {key}")


def port_rule(match: str, protocol: str, port: int, target: Target) -> str:
    """The rule of one port."""
    comment, jump = target
    return f'{match}-p {protocol} -m comment --comment "{comment}" -m {protocol} --dport {port} {jump}'
