"""The spoof guard in the kernel: each wire's elements, and the table around them. What they say is spoofguard.py's.

An ADD binds its wire before it makes it, so that a pod can send nothing unguarded and nothing of it is dropped; 0.1 ms,
one packed message. A DEL unbinds it when it is dead. The table comes with the elements of all wires in one transaction,
so that a node on which pods run already loses no packet when it gets one. Every round reads it back (1 ms with 250
pods): elements that are missing come back, those of nobody go, and a table that is not as it should be is exchanged. A
killed daemon leaves all of it as it is.

Every function here runs on the netlink thread, so that none meets another, and a round does not take for foreign what
an ADD is just adding. nft is a process there, 10 ms, for a table that is not there or not the same.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterable, Sequence

from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.model import Attachment
from ipam_daemon.netlink import NetlinkThread, index_of, naming
from ipam_daemon.spoofguard import (
    COUNTED,
    SETS,
    TABLE,
    Element,
    GuardState,
    elements,
    parse_shape,
    port_of,
    render,
    shape,
)
from podwire.nfelements import Family, Table, add, delete
from podwire.nfnetlink import ElementRefused, Nftables

_FIREWALL = Table(Family.INET, "podwire")
_NFT_SECONDS = 10.0


def read_guard(nftables: Nftables) -> GuardState:
    """What the kernel has now. Raises OSError."""
    found: set[Element] = set()
    for name in SETS:
        keys = nftables.elements(TABLE, name)
        if keys is None:
            return GuardState()
        found.update(Element(name, key) for key in keys)
    return GuardState(parse_shape(nftables.rules(TABLE), nftables.chains(TABLE)), frozenset(found))


class SpoofGuard:
    """Which wire may send as what. Memory and kernel are the same after every call that did not fail."""

    def __init__(self, thread: NetlinkThread, nft: Sequence[str] = ("nft",)) -> None:
        self._thread = thread
        self._nft = tuple(nft)
        self._bound: dict[str, frozenset[Element]] = {}  # by port

    def adopt(self, attachments: Iterable[Attachment]) -> None:
        """Takes wires to be bound that an earlier daemon made; `ensure` sees to the kernel."""
        for attachment in attachments:
            self._bound.setdefault(attachment.host_ifname, elements(attachment))

    def bind(self, attachment: Attachment) -> None:
        """From now on the wire may send as what its attachment says, once it is there, and as nothing else.

        A table that somebody removed comes back. Raises PlumbingFailed, and then nothing is bound.
        """
        port, wanted = attachment.host_ifname, elements(attachment)
        self._bound[port] = wanted
        try:
            try:
                self._commit(added=wanted)
            except FileNotFoundError:
                self.ensure()
        except BaseException:
            del self._bound[port]
            raise

    def unbind(self, port: str) -> None:
        """The wire may send nothing any more. One that is not bound is fine. Raises PlumbingFailed."""
        self._commit(removed=self._bound.get(port, frozenset()))
        self._bound.pop(port, None)

    def is_bound(self, attachment: Attachment) -> bool:
        """Whether the wire is known here."""
        return attachment.host_ifname in self._bound

    def differences(self, attachment: Attachment) -> list[str]:
        """What of the wire's elements is not as ADD left it, in words; empty when all is well."""
        with naming(f"reading table {TABLE}"):
            missing = elements(attachment) - read_guard(self._thread.nftables).elements
        return [f"{attachment.host_ifname} may not send as what it has been given ({TABLE})"] if missing else []

    def ensure(self) -> list[str]:
        """Brings table and elements to what is bound. Returns what had to be done, in words. Raises PlumbingFailed."""
        with naming(f"reading table {TABLE}"):
            state = read_guard(self._thread.nftables)
        there = state.elements
        wanted = frozenset[Element]().union(*self._bound.values())
        unwanted = {element for element in there - wanted if self._is_stale(element)}
        if state.shape != shape():
            self._run(render((wanted | there) - unwanted))
            return [f"made table {TABLE}"]
        missing = wanted - there
        self._commit(added=missing, removed=unwanted)
        done = [f"added {len(missing)} elements of {TABLE}"] if missing else []
        return done + ([f"removed {len(unwanted)} elements of {TABLE}"] if unwanted else [])

    def dropped(self) -> dict[str, int]:
        """Reason → frames that were dropped for it since the table was made; VXLAN is the node's firewall's.

        Raises PlumbingFailed.
        """
        with naming(f"reading counters of {TABLE}"):
            nftables = self._thread.nftables
            found = {**nftables.counters(_FIREWALL), **nftables.counters(TABLE)}
        return {name.removeprefix(COUNTED): found[name] for name in found if name.startswith(COUNTED)}

    def _is_stale(self, element: Element) -> bool:
        """Those of a wire that is there and not known here are left: the journal may take it in yet."""
        port = port_of(element)
        return port in self._bound or not index_of(port)

    def _commit(self, added: Iterable[Element] = (), removed: Iterable[Element] = ()) -> None:
        """Raises FileNotFoundError when there is no set to add to, PlumbingFailed for everything else."""
        changes = [delete(TABLE, each.set, each.key) for each in sorted(removed)]
        changes += [add(TABLE, each.set, each.key) for each in sorted(added)]
        try:
            self._thread.nftables.commit(changes)
        except ElementRefused as error:
            if error.errno == errno.ENOENT and error.change is not None and error.change.adds:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(TABLE)) from error
            raise PlumbingFailed(str(error)) from error
        except OSError as error:
            raise PlumbingFailed(f"elements of {TABLE}: {error}") from error

    def _run(self, script: str) -> None:
        """Blocks the thread: nobody may add an element that is not in the script meanwhile."""
        command = (*self._nft, "-f", "-")
        try:
            done = subprocess.run(
                command, input=script, capture_output=True, text=True, timeout=_NFT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise PlumbingFailed(f"nft gave no answer within {_NFT_SECONDS:g} s") from error
        except OSError as error:
            raise PlumbingFailed(f"{command[0]} cannot be run: {error.strerror}") from error
        if done.returncode:
            raise PlumbingFailed(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
