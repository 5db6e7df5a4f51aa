"""Which sets a pod is in, without asking every set: the selectors in use, filed under what they ask for first.

A set of pods asks for a namespace, for a label of the pod, or for a label of its namespace; it is filed under the first
of those that is a single value, and under nothing when there is none. A pod is then compared with the sets that are
filed under its own namespace and labels, and with those under nothing: its cost grows with the sets that might select
it, not with all. With 1,000 selectors a pod costs some tens of µs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from kube_proxy_lite.model import Address
from kube_proxy_lite.policy.model import (
    BlockSet,
    Direction,
    Member,
    PodSet,
    PolicyClass,
    PortedPodSet,
    SetKey,
)
from kube_proxy_lite.policy.pods import PodFacts

MemberSet = PodSet | PortedPodSet
Labels = Mapping[str, str]
Fact = SetKey | tuple[SetKey, Member] | PolicyClass | tuple[Direction, Address] | Address
Value = PolicyClass | bool | None
Population = Callable[[str], Iterable[tuple[PodFacts, tuple[Address, ...], Labels | None]]]
_Handle = tuple[str, str, str]
_ANY: _Handle = ("", "", "")


class Sets:
    """The sets that classes use, their members, and the facts that have changed.

    A member is counted, since an address passes from one pod to another in two steps, in either order.
    """

    def __init__(self) -> None:
        self._uses: dict[SetKey, int] = {}
        self._members: dict[MemberSet, dict[Member, int]] = {}
        self._of_pod: dict[str, dict[MemberSet, frozenset[Member]]] = {}
        self._index = SelectorIndex()
        self._changed: dict[Fact, Value] = {}

    def record(self, fact: Fact, value: Value) -> None:
        """`fact` is now `value`."""
        self._changed[fact] = value

    def drain(self) -> dict[Fact, Value]:
        """What was recorded since the last call."""
        changed, self._changed = self._changed, {}
        return changed

    def has(self, key: SetKey, member: Member) -> bool:
        """Whether a set that is in use has this member."""
        if isinstance(key, BlockSet):
            return not isinstance(member, tuple) and any(member in network for network in key.networks)
        return member in self._members.get(key, ())

    def state(self) -> dict[Fact, Value]:
        """All sets in use and their members."""
        facts: dict[Fact, Value] = dict.fromkeys(self._uses, True)
        facts.update({(key, member): True for key, found in self._members.items() for member in found})
        return facts

    # --- sets come and go

    def use(self, key: SetKey, population: Population) -> None:
        """A class uses `key`. A set that is new is filled from `population(namespace)`."""
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] > 1:
            return
        self.record(key, True)
        if isinstance(key, BlockSet):
            return
        self._index.add(key)
        self._members[key] = {}
        namespace = key.pods.namespace if isinstance(key, PortedPodSet) else key.namespace
        for pod, addresses, labels in population(namespace):
            if selects(key, pod, labels):
                self._put(pod.uid, key, members(key, pod, addresses))

    def disuse(self, key: SetKey) -> None:
        """A class uses `key` no longer; a set that no class uses is gone, with its members."""
        self._uses[key] -= 1
        if self._uses[key]:
            return
        del self._uses[key]
        if not isinstance(key, BlockSet):
            self._index.remove(key)
            for member in self._members.pop(key):
                self.record((key, member), None)
            for found in self._of_pod.values():
                found.pop(key, None)
        self.record(key, None)

    # --- pods come and go

    def enter(self, pod: PodFacts, addresses: tuple[Address, ...], namespace_labels: Labels | None) -> None:
        """`pod` is in the sets that select it, with these addresses, and in no other."""
        now = {key: members(key, pod, addresses) for key in self._index.selecting(pod, namespace_labels)}
        for key in self._of_pod.get(pod.uid, {}).keys() - now.keys():
            self._put(pod.uid, key, frozenset())
        for key, found in now.items():
            self._put(pod.uid, key, found)

    def leave(self, uid: str) -> None:
        """The pod is in no set any more."""
        for key in list(self._of_pod.get(uid, ())):
            self._put(uid, key, frozenset())

    def _put(self, uid: str, key: MemberSet, now: frozenset[Member]) -> None:
        own = self._of_pod.setdefault(uid, {})
        before, counts = own.get(key, frozenset()), self._members[key]
        for member in now - before:
            counts[member] = counts.get(member, 0) + 1
            self.record((key, member), True)
        for member in before - now:
            counts[member] -= 1
            if not counts[member]:
                del counts[member]
                self.record((key, member), None)
        if now:
            own[key] = now
        else:
            own.pop(key, None)
            if not own:
                del self._of_pod[uid]


class SelectorIndex:
    """The sets in use."""

    def __init__(self) -> None:
        self._filed: dict[_Handle, dict[MemberSet, None]] = {}

    def add(self, key: MemberSet) -> None:
        """`key` is in use."""
        self._filed.setdefault(_handle(key), {})[key] = None

    def remove(self, key: MemberSet) -> None:
        """`key` is not in use any more."""
        handle = _handle(key)
        filed = self._filed[handle]
        del filed[key]
        if not filed:
            del self._filed[handle]

    def selecting(self, pod: PodFacts, namespace_labels: Labels | None) -> Iterator[MemberSet]:
        """The sets that `pod` is in. `namespace_labels` is None while its namespace is not known."""
        handles = [_ANY, ("namespace", pod.namespace, ""), *(("pod", *label) for label in pod.labels.items())]
        handles += [("namespaces", *label) for label in (namespace_labels or {}).items()]
        for handle in handles:
            for key in self._filed.get(handle, ()):
                if selects(key, pod, namespace_labels):
                    yield key


def selects(key: MemberSet, pod: PodFacts, namespace_labels: Labels | None) -> bool:
    """Whether `pod` is in the set, its addresses apart. A namespace that is not known has no labels to go by."""
    if isinstance(key, PortedPodSet):
        return (key.protocol, key.port) in pod.ports and selects(key.pods, pod, namespace_labels)
    if key.namespace:
        return pod.namespace == key.namespace and key.pods.matches(pod.labels)
    return namespace_labels is not None and key.namespaces.matches(namespace_labels) and key.pods.matches(pod.labels)


def members(key: MemberSet, pod: PodFacts, addresses: Iterable[Address]) -> frozenset[Member]:
    """What `pod` contributes to a set that selects it."""
    if isinstance(key, PodSet):
        return frozenset(addresses)
    numbers = pod.ports[key.protocol, key.port]
    return frozenset((address, number) for address in addresses for number in numbers)


def _handle(key: MemberSet) -> _Handle:
    pods = key.pods if isinstance(key, PortedPodSet) else key
    if pods.namespace:
        return "namespace", pods.namespace, ""
    label, namespace_label = pods.pods.handle, pods.namespaces.handle
    if label:
        return "pod", *label
    return ("namespaces", *namespace_label) if namespace_label else _ANY
