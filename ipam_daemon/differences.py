"""A difference between what two sources say of a node: its kinds, with their reasons and remedies. Pure.

A kind has the same reason and remedy wherever it turns up; docs/operations.md has a line for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec


class Kind(msgspec.Struct, frozen=True):
    """Why such a difference comes about, what a repair does (empty: nothing) and what is left for people to do."""

    why: str
    fix: str = ""
    advice: str = ""

    @property
    def patient(self) -> bool:
        """Whether it is worth waiting for the repair to show."""
        return bool(self.fix) and not self.advice


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """`says` is what each source says about `subject`; it may vary from look to look."""

    kind: str
    subject: str
    says: Mapping[str, str]

    @property
    def identity(self) -> tuple[str, str]:
        """The same for the same difference in another look."""
        return self.kind, self.subject


_ROUND = "the periodic reconcile was not there yet, or failed"
_NAME_AGAIN = "compares with etcd again: publishes the record, claims its blocks where nobody else has them"
_NETWORK = "brings devices, entries and rules back to the plan"
_ENTRIES = {
    f"{what}-{how}": Kind(f"somebody {did} it, or {_ROUND}", _NETWORK)
    for what in ("neighbour", "fdb", "route")
    for how, did in (("missing", "deleted"), ("stale", "added"), ("changed", "changed"))
}
KINDS: dict[str, Kind] = {
    # wires
    "orphan-wire": Kind(
        "the journal was lost or replaced while the wire lived",
        "takes the wire into the journal; deletes it if its DEL was done, or if its attachment or address is another's",
    ),
    "nameless-wire": Kind(
        "a wire of ours without alias and without row: nobody can say whose it is",
        advice="look at the pod at its other end; delete the link when there is none",
    ),
    "renamed-wire": Kind("somebody renamed the link", "gives it its name back"),
    "wire-gone": Kind(
        "the pod's namespace is gone, or somebody deleted the link; the runtime has not called DEL",
        "frees the address after two looks",
    ),
    "port-detached": Kind("somebody took the link out of the bridge, or down", "puts it back, and up"),
    "alias-lost": Kind(
        "somebody changed the link's alias, from which a lost journal would be rebuilt", "writes it again"
    ),
    "namespace-gone": Kind(
        "the namespace's path was removed, and something keeps the namespace (a process, an open file)",
        advice="the address stays taken while the wire lives: end what is left of the pod, or let the runtime call DEL",
    ),
    "pod-changed": Kind(
        "something inside the pod changed its network", advice="recreate the pod; what is inside is not repaired"
    ),
    "unfinished-add": Kind(
        "an ADD ended halfway, or has been under way for long", "undoes it, unless it is still under way"
    ),
    "releasing-stuck": Kind(
        "the wire of a DEL that was answered cannot be deleted, or left the group of wires to delete",
        "takes it down and deletes it; until it is gone its address is nobody's",
    ),
    # sandboxes
    "runtime-unreachable": Kind(
        "the container runtime did not answer", advice="look at the endpoint, and at the runtime"
    ),
    "sandbox-gone": Kind(
        "the runtime removed the sandbox without a DEL, or its DEL was lost",
        "does what the DEL would have done, if two looks have missed the sandbox",
    ),
    "sandbox-unattached": Kind(
        "the sandbox was set up by another plugin or before Podwire, or its DEL was done and it goes on",
        advice="recreate the pod: it has no address of this node",
    ),
    # addresses
    "address-twice": Kind(
        "two rows have one address, which no allocation does: the journal was changed or rebuilt from damaged wires",
        advice="delete both pods; neither address is freed by a repair",
    ),
    "address-stranded": Kind(
        "the pod's address is in no block of this node: its block went to another node",
        "cuts the wire, since the address may be in use elsewhere",
        "move the pod away: until it is deleted no pod is added here",
    ),
    "address-unheld": Kind(
        "the allocator would hand out an address that a row has", "counts the addresses again from the journal"
    ),
    "address-leaked": Kind(
        "the allocator counts an address as taken that no row has", "counts the addresses again from the journal"
    ),
    # blocks and the name
    "etcd-unreachable": Kind("etcd did not answer, or refused", advice="see `podwire status`"),
    "block-not-in-etcd": Kind(
        "etcd was wiped or restored, somebody deleted the key, or the node was forgotten", _NAME_AGAIN
    ),
    "block-not-in-journal": Kind("a claim was not finished, or etcd was restored", "takes the block up"),
    "block-of-another": Kind(
        "the node was away for long and was forgotten, or etcd was restored",
        "gives the block up, and cuts the wires of the pods in it",
        "move those pods away",
    ),
    "record-missing": Kind("etcd was wiped or restored, or the node was forgotten", _NAME_AGAIN),
    "record-differs": Kind("somebody wrote it, or the daemon could not yet", _NAME_AGAIN),
    "name-not-live": Kind(
        "somebody deleted the live key, or etcd was away for longer than its lease", "takes the name again"
    ),
    # the node
    "node-not-set-up": Kind("the daemon has not brought the kernel to a plan yet", advice="see `podwire status`"),
    "bridge-missing": Kind("somebody deleted the bridge", _NETWORK + ", and the pods' ports into it"),
    "bridge-changed": Kind("somebody changed the bridge", _NETWORK),
    "bridge-address": Kind("somebody changed the bridge's addresses", _NETWORK),
    "bridge-route": Kind("somebody deleted the route to the node's own pods, or put another in its place", _NETWORK),
    "vxlan-missing": Kind("somebody deleted the device", _NETWORK),
    "vxlan-changed": Kind("somebody changed the device", _NETWORK),
    **_ENTRIES,
    "rules-changed": Kind("somebody deleted or flushed our nft table, or it is another version's", _NETWORK),
    "elements-changed": Kind("somebody changed the sets of our nft table", _NETWORK),
    "sysctl-changed": Kind("somebody set it", _NETWORK),
    # what a pod has besides its wire
    "guard-changed": Kind(
        "somebody deleted or changed the table that binds pods to their addresses, or it is another version's", _NETWORK
    ),
    "guard-elements": Kind(
        "somebody changed what the pod may send as: what is missing of it is dropped", "binds the pod to its addresses"
    ),
    "guard-stale": Kind("somebody added it, or a wire went while no daemon ran", _NETWORK),
    "host-ports-changed": Kind(
        "somebody deleted or changed the table of ports of the node, or it is another version's", "makes it again"
    ),
    "host-port-missing": Kind("somebody deleted elements of that table", "leads the pod's ports to it again"),
    "host-port-stale": Kind("somebody added it, or a version without ports deleted the pod", "removes it"),
    "limit-changed": Kind(
        "somebody deleted or changed the queue of a limited wire, or what leads to it", "makes the queues again"
    ),
    "orphan-queue": Kind("the wire went without a DEL, or somebody made the device", "deletes it"),
    # the queue
    "del-waiting": Kind(
        "the executable could not reach the daemon, and the DEL was not replayed yet or fails", "replays it"
    ),
    "del-unreadable": Kind(
        "a file of the queue is damaged, or a DEL that can never be done", advice="look at it, then delete it"
    ),
}


def lasting(first: Iterable[Difference], second: Iterable[Difference]) -> tuple[Difference, ...]:
    """Those of the second look that the first had found, too."""
    known = {each.identity for each in first}
    return tuple(each for each in second if each.identity in known)


def difference(kind: str, subject: str, **says: str) -> Difference:
    """A difference of a kind, and what each source says."""
    assert kind in KINDS
    return Difference(kind=kind, subject=subject, says=says)
