"""Points at which the daemon can be made to fail, so that a test can ask what each of them leaves behind.

    point("add.wired")        in the code, where the wire is made and its commit is not journaled yet

In a daemon whose environment names a file in PODWIRE_FAULT, the file says which point does what: `add.wired kill` ends
the process as a crash does (SIGKILL: nothing is flushed, closed or undone), `add.wired raise` raises FaultRaised there,
`add.wired delay 0.5` stops the thread for so many seconds. A file that is empty or absent does nothing; it is read at
every point, so that a running daemon can be armed and disarmed. In every other daemon a point is one comparison with
None (20 ns, of which an ADD meets ten).

POINTS is the register: a test walks over it, and another holds it against the calls in the code.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from podwire.errors import PodwireError

VARIABLE: Final = "PODWIRE_FAULT"

POINTS: Final = {
    "start.restored": "the journal is taken up, no call was answered yet",
    "start.undoing": "the wire of an ADD that was not finished is dead, its row is still there",
    "join.entered": "the node's name is taken in etcd",
    "join.published": "the node's record is in etcd",
    "converge.bridge": "bridge and VXLAN device are there",
    "converge.firewall": "the firewall's rules are there",
    "converge.peers": "the routes to the other nodes are there",
    "add.allocated": "an address is chosen, nothing is written",
    "add.intended": "the intent is journaled",
    "add.bound": "the wire that is not there yet may send as its pod, and as nobody else",
    "add.pair-made": "both ends of the wire exist",
    "add.limited": "the queues of the wire are there, the pod's end is down",
    "add.pod-configured": "the pod's end has its address and route",
    "add.port-configured": "the node's end says whose it is",
    "add.wired": "the wire works",
    "add.settled": "the pod's policies are in the kernel, no port of the node leads to it",
    "add.host-ports-open": "the ports of the node lead to the pod, the commit is not journaled",
    "add.committed": "the commit is journaled, nobody has the answer",
    "undo.begun": "the wire could not be made, the intent is still journaled",
    "undo.forgotten": "the intent is gone from the journal",
    "del.marked": "the tombstone is set",
    "del.killed": "nothing passes the wire any more, the journal still has the attachment",
    "del.host-ports-closed": "no port of the node leads to the pod any more, the journal still has the attachment",
    "del.released": "the journal has the wire as one to be deleted, nobody has the answer",
    "reap.deleted": "the links are gone, the journal still has them",
    "reap.cooled": "the addresses cool",
    "queue.replayed": "a queued DEL is done, its file is still there",
    "queue.removed": "the file of a queued DEL is gone, its folder not synced",
    "mtu.resized": "both ends of a wire have another MTU, the journal says that they are being given it",
    "block.claimed": "etcd says that the block is this node's, the journal does not",
    "block.journaled": "the journal has the node's blocks, the peers were not told",
    "block.published": "the peers were told of the node's blocks, its bridge lacks the gateway",
    "block.plumbed": "the bridge has the gateways, no address of a new block is handed out",
    "block.retired": "an empty block gives no more addresses, journal and etcd still have it",
    "block.released": "etcd gives the block to whoever wants it",
    "held.written": "the new file of addresses for the next boot is written, the old one is in its place",
    "journal.intending": "amid the transaction that records an intent",
    "journal.releasing": "amid the transaction that turns an attachment into a wire to be deleted",
    "journal.cooling": "amid the transaction that lets addresses cool",
    "journal.setting-blocks": "amid the transaction that records the blocks",
}
"""Every point, and what is so when it is reached."""


class FaultRaised(PodwireError):
    """What a point raises when it was told to."""


def _follow(file: Path) -> Callable[[str], None]:
    """What a point does in a daemon that is told by `file`."""

    def trap(name: str) -> None:
        try:
            wanted, action, *argument = file.read_text(encoding="ascii").split() or ("", "")
        except FileNotFoundError:
            return
        if wanted == name:
            act(name, action, *argument)

    return trap


def act(name: str, action: str, seconds: str = "0") -> None:
    """Fails as told, at once. Raises FaultRaised, for `raise` and for what is no action."""
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "delay":
        time.sleep(float(seconds))
    else:
        raise FaultRaised(f"fault at {name}")


_trap: Callable[[str], None] | None = _follow(Path(os.environ[VARIABLE])) if VARIABLE in os.environ else None


def point(name: str) -> None:
    """A place of the code where it may be told to fail; `name` is one of POINTS."""
    if _trap is not None:
        _trap(name)
