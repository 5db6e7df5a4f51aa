"""Who has what in the cluster, kept in etcd: the configuration, blocks of addresses, nodes, and which of them live.

    /podwire/v1/config          ClusterConfig    written by the first daemon, compared by all others
    /podwire/v1/blocks/<cidr>   Block            one key per block and family; permanent until released
    /podwire/v1/nodes/<name>    NodeRecord       what peers need to reach the node's pods; permanent
    /podwire/v1/live/<name>     Live             under a lease: says only that the daemon lives (ipam_daemon.live_name)
    /podwire/v1/gone/<name>     Gone             since when the daemon has not lived (ipam_daemon.departures)
    /podwire/v1/restored        Restored         under a lease: no new claims for now (ipam_daemon.restoration)
    /podwire/v1/forgotten/<name> Forgotten       somebody made the cluster forget the node, until it joins again

This is the port; ipam_daemon/etcd_registry.py carries it out, and registry_fake.py does so in memory, for tests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

from ipam_daemon.claims import Entry, NodeNameTaken
from ipam_daemon.model import Block, ClusterConfig, NodeRecord, Pool

ROOT = "/podwire/v1/"


class Registry(Protocol):
    """The port. All but `watch_nodes` and `lost` raise EtcdUnavailable (TryAgain) while the store is away."""

    async def agree(self, config: ClusterConfig) -> ClusterConfig:
        """Writes the cluster's configuration if there is none; returns the one that holds. Raises ConfigMismatch."""

    def watch_config(self) -> AsyncGenerator[ClusterConfig, None]:
        """The cluster's configuration, and again whenever somebody changes it. One that is deleted or cannot be read is
        passed over, logged. Waits out outages; close it when done (aclosing)."""

    def seen(self) -> str:
        """How far the store has come, for `recall` by the next process; empty before the first answer."""

    def recall(self, seen: str) -> None:
        """What a former process had `seen`: a store that has not come as far was wiped or restored. Comes first."""

    async def restored(self) -> str:
        """Returns each time that the store was found to be wiped or restored, and says how.

        The node must then `agree`, `reclaim_block` each of its blocks and `publish` again.
        """

    async def enter(self, name: str, node_id: str) -> Entry:
        """Takes the node's name and keeps it until `leave`. Raises NodeNameTaken at once when another machine has it.

        A former process of the same machine is succeeded at once. Blocks of a former machine of the name go over to
        this one, under a higher generation.
        """

    async def look_at_name(self) -> None:
        """Takes the name again should its key be gone while its lease lives. Does nothing without `enter`."""

    async def lost(self) -> NodeNameTaken:
        """Returns when the name went to someone else after `enter`, and says to whom: the daemon must stop."""

    async def leave(self) -> None:
        """Gives the name back on an orderly end. Does nothing without `enter`."""

    async def load_blocks(self, name: str) -> tuple[Block, ...]:
        """The blocks of a node, by name, lowest key first."""

    async def claim_block(self, pool: Pool, node: str, node_id: str, generation: int) -> Block:
        """One more block of `pool` for `node`. Raises PoolExhausted; for a while after `restored` StoreRestored."""

    async def reclaim_block(self, block: Block) -> str | None:
        """Claims a block that its owner remembers and the store has lost. Returns the name of the node that has it, or
        part of it, instead; None when it is claimed, or was never lost. One that this machine has under a former name
        gets the new one; raises TryAgain while a daemon holds the former."""

    async def release_block(self, block: Block) -> bool:
        """Deletes `block` if its owner and generation are still these; returns whether it did."""

    async def publish(self, record: NodeRecord) -> None:
        """Tells the peers. Raises NodeNameTaken when the name's record is another machine's of no lower generation."""

    def watch_nodes(self) -> AsyncGenerator[Mapping[str, NodeRecord], None]:
        """All nodes by name, and all again whenever something changed; changes in quick succession may come as one.

        Nodes that a wiped or restored store has lost stay in it until they publish again, or another node has one of
        their blocks; but this node's own (after `enter`) goes, so that it sees that it must publish. Who starts to
        watch while claims wait (StoreRestored) gets nothing before they go on: until then the list is not whole.

        A record that cannot be decoded is left out and logged once. Waits out outages; close it when done (aclosing).
        """
