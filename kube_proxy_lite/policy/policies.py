"""Pods, namespaces and policies together: which classes there are, who is in which, and what is in the sets.

    set_pod, set_namespace, set_policy, attach …  ──▶  Policies  ──▶  drain(): the facts that changed

The state is a function of what was set and not dropped, never of the order (tests compare it with one that is made from
scratch after every event). A change costs what it changes: a pod costs the sets that select it and its own class, a
policy the local pods of its namespace and, for a selector that is new, a look at every pod; a namespace its pods.

Facts are a flat mapping, so that whoever renders them needs no diff of its own. Key → value, None for "not there":

    SetKey                  a set is in use (True)
    (SetKey, Member)        it has this member (True)
    PolicyClass             a class is in use (True)
    (Direction, Address)    the local pod with this address is in this class; absent: nobody isolates it
    Address                 this address is a local pod's, who is known (True)

An address belongs to one pod, of several that claim it to the one that was created last: a late DELETE of the former
owner changes nothing. What the node's daemon says goes before the API's status, be it of another pod: it has given the
address out (`attach`), and says so before the API has heard of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from kube_proxy_lite.model import Address
from kube_proxy_lite.policy.membership import Fact, Labels, Sets, Value
from kube_proxy_lite.policy.model import Direction, Member, PolicyClass, SetKey
from kube_proxy_lite.policy.pods import PodFacts, facts_of
from kube_proxy_lite.policy.rules import CompiledPolicy, class_rules, compile_policy, compile_unreadable
from podwire.kube.objects import Namespace, NetworkPolicy, Pod

ObjectKey = tuple[str, str]
Classes = Mapping[Direction, PolicyClass]


class _Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A protected pod: the names of the policies that select it, and the classes that they put it in."""

    addresses: tuple[Address, ...]
    policies: tuple[str, ...]
    classes: dict[Direction, PolicyClass]


class Policies:
    """The policies of a cluster, as one node sees them. Not for use from several threads."""

    def __init__(self, node: str | None) -> None:
        """`node` is whose pods are protected; None protects the pods of every node, for who only wants to know."""
        self._node = node
        self._pods: dict[str, PodFacts] = {}
        self._uid_of: dict[ObjectKey, str] = {}
        self._pods_of: dict[str, set[str]] = {}  # namespace → uids
        self._namespaces: dict[str, dict[str, str]] = {}
        self._policies: dict[str, dict[str, CompiledPolicy]] = {}  # namespace → name → policy
        self._attached: dict[ObjectKey, tuple[str, tuple[Address, ...]]] = {}  # pod → (runtime's uid, addresses)
        self._claims: dict[Address, set[str]] = {}  # address → uids of the pods that claim it
        self._claimed: dict[str, tuple[Address, ...]] = {}
        self._subjects: dict[str, _Subject] = {}
        self._built: dict[tuple[object, ...], PolicyClass] = {}
        self._classes: dict[PolicyClass, int] = {}  # in use → by how many pods
        self._sets = Sets()

    # --- what there is

    def set_pod(self, pod: Pod) -> None:
        """`pod` is there, new or changed."""
        facts = facts_of(pod)
        former = self._uid_of.get(pod.key)
        if former is not None and (facts is None or former != facts.uid):
            self._remove_pod(former)
        if facts is None:
            return
        if self._pods.get(facts.uid) == facts:
            return
        self._pods[facts.uid] = facts
        self._uid_of[pod.key] = facts.uid
        self._pods_of.setdefault(facts.namespace, set()).add(facts.uid)
        self._claim(facts.uid)

    def drop_pod(self, key: ObjectKey) -> None:
        """There is no pod (namespace, name) any more."""
        uid = self._uid_of.get(key)
        if uid is not None:
            self._remove_pod(uid)

    def attach(self, key: ObjectKey, uid: str, addresses: tuple[Address, ...]) -> None:
        """The node's daemon has given `addresses` to the pod (namespace, name). `uid` is the runtime's, or empty."""
        self._attached[key] = (uid, addresses)
        self._reclaim(key)

    def detach(self, key: ObjectKey) -> None:
        """The node's daemon has no such attachment any more; what the API says of the pod's addresses counts again."""
        if self._attached.pop(key, None) is not None:
            self._reclaim(key)

    def set_namespace(self, namespace: Namespace) -> None:
        """`namespace` is there, new or changed."""
        labels = namespace.metadata.labels or {}
        if self._namespaces.get(namespace.metadata.name) != labels:
            self._namespaces[namespace.metadata.name] = labels
            self._refresh(sorted(self._pods_of.get(namespace.metadata.name, ())))

    def drop_namespace(self, key: ObjectKey) -> None:
        """There is no namespace ("", name) any more."""
        if self._namespaces.pop(key[1], None) is not None:
            self._refresh(sorted(self._pods_of.get(key[1], ())))

    def set_policy(self, policy: NetworkPolicy) -> None:
        """`policy` is there, new or changed."""
        namespace, name = policy.key
        compiled, former = compile_policy(policy), self._policies.get(namespace, {}).get(name)
        if former != compiled:
            self._policies.setdefault(namespace, {})[name] = compiled
            self._apply_policy(namespace, name, compiled)

    def set_unreadable(self, key: ObjectKey) -> None:
        """There is a policy (namespace, name) that cannot be decoded. What was last read of it holds; one that never
        could be read closes its namespace, since nobody knows whom it was to protect."""
        namespace, name = key
        if name not in self._policies.get(namespace, {}):
            closed = compile_unreadable(namespace, name)
            self._policies.setdefault(namespace, {})[name] = closed
            self._apply_policy(namespace, name, closed)

    def drop_policy(self, key: ObjectKey) -> None:
        """There is no policy (namespace, name) any more."""
        namespace, name = key
        former = self._policies.get(namespace, {}).pop(name, None)
        if former is not None:
            if not self._policies[namespace]:
                del self._policies[namespace]
            self._apply_policy(namespace, name, None)

    # --- what follows

    def drain(self) -> dict[Fact, Value]:
        """The facts that may have changed since the last call, with what they are now."""
        return self._sets.drain()

    @property
    def any(self) -> bool:
        """Whether there is any policy in the cluster: without one an address that nobody knows is left alone."""
        return bool(self._policies)

    def problems(self) -> dict[ObjectKey, tuple[str, ...]]:
        """Policy → what in it could not be understood."""
        return {
            (namespace, name): policy.problems
            for namespace, policies in self._policies.items()
            for name, policy in policies.items()
            if policy.problems
        }

    def owner(self, address: Address) -> PodFacts | None:
        """The pod that has `address`, None when nobody is known to."""
        pods = [self._pods[uid] for uid in self._claims.get(address, ())]
        if len(pods) > 1:
            return max(pods, key=lambda pod: (address in self._given(pod), pod.order))
        return pods[0] if pods else None

    def pod(self, key: ObjectKey) -> PodFacts | None:
        """The pod (namespace, name), when it takes part in the network."""
        uid = self._uid_of.get(key)
        return None if uid is None else self._pods[uid]

    def pods(self) -> Iterable[PodFacts]:
        """All pods that take part in the network."""
        return self._pods.values()

    def addresses(self, pod: PodFacts) -> tuple[Address, ...]:
        """The addresses that `pod` has; one that a later pod claims, too, is not among them."""
        return tuple(each for each in self._claimed.get(pod.uid, ()) if self.owner(each) is pod)

    def classes(self, pod: PodFacts) -> Classes:
        """The classes of a protected pod; a direction that nobody isolates is absent."""
        subject = self._subjects.get(pod.uid)
        return subject.classes if subject else {}

    def isolated(self) -> frozenset[int]:
        """The addresses, as numbers, of protected pods that a policy isolates."""
        return frozenset(
            int(each) for subject in self._subjects.values() if subject.classes for each in subject.addresses
        )

    def is_protected(self, pod: PodFacts) -> bool:
        """Whether the policies of `pod` are this node's to enforce."""
        return self._node is None or pod.node == self._node

    def has(self, key: SetKey, member: Member) -> bool:
        """Whether a set that is in use has this member."""
        return self._sets.has(key, member)

    def state(self) -> dict[Fact, Value]:
        """All facts as they are now: what `drain` has said so far, added up."""
        facts = self._sets.state() | dict.fromkeys(self._classes, True)
        for subject in self._subjects.values():
            facts.update(dict.fromkeys(subject.addresses, True))
            facts.update({(way, each): found for way, found in subject.classes.items() for each in subject.addresses})
        return facts

    # --- addresses

    def _claim(self, uid: str) -> None:
        """Settles which addresses a pod claims, and looks again at everybody whom that concerns."""
        pod = self._pods[uid]
        before, now = self._claimed.get(uid, ()), self._wanted_addresses(pod)
        concerned = {uid}
        for address in {*before, *now}:
            claims = self._claims.setdefault(address, set())
            concerned |= claims
            (claims.add if address in now else claims.discard)(uid)
            if not claims:
                del self._claims[address]
        self._claimed[uid] = now
        self._refresh(sorted(concerned))

    def _reclaim(self, key: ObjectKey) -> None:
        uid = self._uid_of.get(key)
        if uid is not None:
            self._claim(uid)

    def _given(self, pod: PodFacts) -> tuple[Address, ...]:
        """The addresses that the node's daemon has given to a pod."""
        uid, addresses = self._attached.get((pod.namespace, pod.name), ("", ()))
        return addresses if not uid or uid in pod.uids else ()

    def _wanted_addresses(self, pod: PodFacts) -> tuple[Address, ...]:
        return self._given(pod) or pod.addresses

    def _remove_pod(self, uid: str) -> None:
        pod = self._pods.pop(uid)
        del self._uid_of[pod.namespace, pod.name]
        mates = self._pods_of[pod.namespace]
        mates.discard(uid)
        if not mates:
            del self._pods_of[pod.namespace]
        heirs: set[str] = set()
        for address in self._claimed.pop(uid):
            claims = self._claims[address]
            claims.discard(uid)
            heirs |= claims
            if not claims:
                del self._claims[address]
        self._sets.leave(uid)
        touched = self._settle(uid, None)
        self._refresh(sorted(heirs))
        self._record(touched)

    # --- looking again

    def _refresh(self, uids: Iterable[str]) -> None:
        """The sets and the class of these pods."""
        touched: set[Address] = set()
        for uid in uids:
            pod = self._pods[uid]
            self._sets.enter(pod, self.addresses(pod), self._namespaces.get(pod.namespace))
            touched |= self._settle(uid, self._subject(pod))
        self._record(touched)

    def _apply_policy(self, namespace: str, name: str, now: CompiledPolicy | None) -> None:
        """Looks again at the pods that a policy selects, or did."""
        self._built.clear()
        touched: set[Address] = set()
        for uid in self._pods_of.get(namespace, ()):
            subject = self._subjects.get(uid)
            if subject is None:
                continue
            pod = self._pods[uid]
            selected = now is not None and now.selects.matches(pod.labels)
            if selected or name in subject.policies:
                names = {*subject.policies, name} if selected else set(subject.policies) - {name}
                touched |= self._settle(uid, self._with_policies(pod, tuple(sorted(names))))
        self._record(touched)

    def _subject(self, pod: PodFacts) -> _Subject | None:
        if not self.is_protected(pod):
            return None
        found = self._policies.get(pod.namespace, {})
        return self._with_policies(
            pod, tuple(sorted(n for n, each in found.items() if each.selects.matches(pod.labels)))
        )

    def _with_policies(self, pod: PodFacts, names: tuple[str, ...]) -> _Subject:
        classes = {way: found for way in Direction if (found := self._class_of(pod, way, names)) is not None}
        return _Subject(addresses=self.addresses(pod), policies=names, classes=classes)

    def _class_of(self, pod: PodFacts, way: Direction, names: tuple[str, ...]) -> PolicyClass | None:
        policies = [self._policies[pod.namespace][name] for name in names]
        isolating = [each for each in policies if way in each.isolates]
        if not isolating:
            return None
        key = (way, pod.namespace, tuple(each.ref.policy for each in isolating), tuple(sorted(pod.ports.items())))
        built = self._built.get(key)
        if built is None:
            rules = (rule for each in isolating for rule in class_rules(each, way, pod.ports))
            built = PolicyClass(way, tuple(each.ref for each in isolating), tuple(dict.fromkeys(rules)))
            self._built[key] = built
        return built

    def _settle(self, uid: str, subject: _Subject | None) -> set[Address]:
        """Gives a pod its classes: the new are in use before the old are not. Returns the addresses concerned."""
        former = self._subjects.pop(uid, None)
        if subject is not None:
            self._subjects[uid] = subject
            for each in subject.classes.values():
                self._use(each)
        for each in former.classes.values() if former else ():
            self._disuse(each)
        return {*(former.addresses if former else ()), *(subject.addresses if subject else ())}

    def _use(self, found: PolicyClass) -> None:
        self._classes[found] = self._classes.get(found, 0) + 1
        if self._classes[found] == 1:
            for key in _set_keys(found):
                self._sets.use(key, self._population)
            self._sets.record(found, True)

    def _disuse(self, found: PolicyClass) -> None:
        self._classes[found] -= 1
        if not self._classes[found]:
            del self._classes[found]
            self._sets.record(found, None)
            for key in _set_keys(found):
                self._sets.disuse(key)

    def _population(self, namespace: str) -> Iterator[tuple[PodFacts, tuple[Address, ...], Labels | None]]:
        """The pods of one namespace, of all when it is empty, with their addresses and their namespace's labels."""
        uids = self._pods_of.get(namespace, ()) if namespace else self._pods
        for uid in uids:
            pod = self._pods[uid]
            yield pod, self.addresses(pod), self._namespaces.get(pod.namespace)

    def _record(self, addresses: Iterable[Address]) -> None:
        for address in addresses:
            pod = self.owner(address)
            subject = self._subjects.get(pod.uid) if pod else None
            self._sets.record(address, True if subject else None)
            for way in Direction:
                self._sets.record((way, address), subject.classes.get(way) if subject else None)


def _set_keys(found: PolicyClass) -> list[SetKey]:
    return list(dict.fromkeys(rule.peers for rule in found.rules if rule.peers is not None))
