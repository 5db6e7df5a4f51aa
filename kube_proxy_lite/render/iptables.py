"""The iptables mode: Services as chains that operators know, reached by trees. Plans in, restore texts out. Pure.

    iptables_chains        a plan's chains and the shared ones: names, rules, a packet's path
    iptables_tree          dispatch by address and port in logarithmic time
    iptables_transactions  changes of chains as bounded texts, in an order that loses no packet
    iptables_listing       what iptables-save prints, read back
    iptables_tracer        a packet's way through the rules, for tests and for `podwire service trace`

**Cost.** `update` renders the changed plans as they were and as they are, and the nodes of the trees on the way to
their places, and sends the chains that differ: some 10 lines for an endpoint, 60 for a Service, whatever the number of
Services. Kept are the plans, which the model keeps too, and what each place leads to; no chain's text is. `resync`
renders everything and compares it with a listing, chain by chain.

**Restart.** A chain's name and text follow from plans and settings alone, so a restart finds its own and changes
nothing. Chains that a kube-proxy has left under the same names are replaced one by one, and served by until then;
those that have no counterpart are removed. Chains of others are never named, and the kernel's only to add or take out
our own jumps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from kube_proxy_lite.model import PortKey, PortPlan, Settings
from kube_proxy_lite.render.interface import Changes, ClusterIPs
from kube_proxy_lite.render.iptables_chains import (
    BOARDS,
    EXTERNAL_NODEPORTS,
    NODEPORTS,
    SERVICES,
    Board,
    Entry,
    entries,
    hooks,
    pod_matches,
    root_tail,
    service_chains,
    shared_chains,
)
from kube_proxy_lite.render.iptables_listing import MARKER, Chain, Listing, Listings, is_same
from kube_proxy_lite.render.iptables_transactions import LIMIT, TABLES, Batch, Transaction
from kube_proxy_lite.render.iptables_tree import AddressTree, Parts, Ports, Rules, Target

Transactions = tuple[Transaction, ...]
Rendered = dict[Chain, Rules | Callable[[], Rules]]
SHAPE = "podwire iptables shape 1"
"""What the marker says; another number for chains that mean something else."""


class IptablesRenderer:
    """interface.Renderer for iptables. Before the first `resync`, nothing is returned."""

    def __init__(self, settings: Settings, versions: Sequence[int] = (4, 6), limit: int = LIMIT) -> None:
        """`versions` are the families that the node has; plans of others are passed over. Raises BadInterface."""
        for version in versions:
            pod_matches(settings, version)
        self._limit = limit
        self._families = {version: _Family(version, settings) for version in versions}
        self._synced = False

    def update(self, changes: Changes, cluster_ips: ClusterIPs) -> Transactions:  # noqa: ARG002
        """See interface.Renderer. A ClusterIP without a port that is asked for has no rule in this mode."""
        batches = []
        for version, family in self._families.items():
            plans = {key: plan for key, plan in changes.items() if key.version == version}
            if plans:
                batches.append(family.update(plans, self._synced))
        return self._made(batches)

    def configure(self, settings: Settings) -> Transactions:
        """See interface.Renderer. Raises BadInterface, and nothing has changed then.

        Renders everything, twice, when pods are told otherwise; else the chains that are always there.
        """
        for version in self._families:
            pod_matches(settings, version)
        batches = [family.configure(settings) for family in self._families.values()]
        return self._made(batches)

    def accept_health_checks(self, ports: Collection[int]) -> Transactions:
        """See interface.Renderer."""
        batches = [family.accept(frozenset(ports)) for family in self._families.values()]
        return self._made(batches)

    def _made(self, batches: Iterable[Batch]) -> Transactions:
        if not self._synced:
            return ()
        return tuple(each for batch in batches for each in batch.transactions(self._limit))

    def resync(self, listing: Listings) -> Transactions:
        """See interface.Renderer."""
        self._synced = True
        return self._made(family.resync(listing.get(version, Listing())) for version, family in self._families.items())


class _Family:
    """One family: its plans, and the boards on which their places stand."""

    def __init__(self, version: int, settings: Settings) -> None:
        self.version = version
        self._settings = settings
        self._plans: dict[PortKey, PortPlan] = {}
        self._health_ports: frozenset[int] = frozenset()
        self._boards: dict[Board, AddressTree | Ports] = {}
        self._clear()

    def _clear(self) -> None:
        for board in BOARDS:
            seed = f"{board.table} {board.root}"
            self._boards[board] = Ports(seed) if board.at_node else AddressTree(seed, self.version)

    # --- A change -----------------------------------------------------------------------------------------------

    def update(self, changes: Mapping[PortKey, PortPlan | None], synced: bool) -> Batch:
        """Takes changes in. Without `synced`, what they change is not asked for."""
        old = [self._plans[key] for key in changes if key in self._plans]
        new = [plan for plan in changes.values() if plan is not None]
        were, are = self._entries(old), self._entries(new)
        touched = [entry for entry in {**were, **are} if were.get(entry) != are.get(entry)]
        before = self._chains(old, touched) if synced else {}
        for entry in touched:
            if entry not in are:
                self._put(entry, None)
        for entry in touched:
            if entry in are:
                self._put(entry, are[entry])
        for key, plan in changes.items():
            if plan is not None:
                self._plans[key] = plan
            else:
                self._plans.pop(key, None)
        return _difference(self.version, before, self._chains(new, touched) if synced else {})

    def configure(self, settings: Settings) -> Batch:
        if pod_matches(self._settings, self.version) == pod_matches(settings, self.version):
            before = self._constant()
            self._settings = settings
            return _difference(self.version, before, self._constant())
        before = self.render()
        self._settings = settings
        self._clear()
        for entry, target in self._entries(self._plans.values()).items():
            self._put(entry, target)
        return _difference(self.version, before, self.render())

    def accept(self, ports: frozenset[int]) -> Batch:
        before = self._constant()
        self._health_ports = ports
        return _difference(self.version, before, self._constant())

    def _entries(self, plans: Iterable[PortPlan]) -> dict[Entry, Target]:
        return {entry: target for plan in plans for entry, target in entries(plan, self._settings)}

    def _put(self, entry: Entry, target: Target | None) -> None:
        board, address, protocol, port = entry
        tree = self._boards[board]
        if isinstance(tree, Ports):
            tree.set(protocol, port, target)
        else:
            tree.set(address, protocol, port, target)

    # --- Rendering ----------------------------------------------------------------------------------------------

    def render(self) -> Rendered:
        """Every chain."""
        found = self._shared() | self._chains(self._plans.values(), None)
        found["nat", MARKER] = (f'-m comment --comment "{SHAPE}" -j RETURN',)
        return found

    def _constant(self) -> Rendered:
        """The chains that are always there, and the roots of the trees."""
        return self._shared() | self._chains((), ())

    def _shared(self) -> Rendered:
        shared = shared_chains(self._settings, self.version, self._health_ports)
        return {(table, name): rules for table, chains in shared.items() for name, rules in chains.items()}

    def _chains(self, plans: Iterable[PortPlan], touched: Collection[Entry] | None) -> Rendered:
        """The chains of some plans and of the boards; of these, given `touched`, what can have changed."""
        found: Rendered = {}
        for plan in plans:
            for table, chains in service_chains(plan, self._settings).items():
                for name, rules in chains.items():
                    found[table, name] = rules
        for board in BOARDS:
            found |= self._board_chains(board, touched)
        return found

    def _board_chains(self, board: Board, touched: Collection[Entry] | None) -> Rendered:
        tree = self._boards[board]
        here = None if touched is None else [entry for entry in touched if entry[0] == board]
        chains: Parts
        if isinstance(tree, Ports):
            chains = tree.chains(None if here is None else [(protocol, port) for _, _, protocol, port in here])
            chains[board.root] = tree.entries()
        else:
            chains = tree.chains(None if here is None else {address for _, address, _, _ in here})
            chains[board.root] = self._root(board, tree)
        return {(board.table, name): rules for name, rules in chains.items()}

    def _root(self, board: Board, tree: AddressTree) -> Rules:
        nodeports = self._boards[NODEPORTS if board is SERVICES else EXTERNAL_NODEPORTS]
        assert isinstance(nodeports, Ports)
        root = tree.root()
        entry = () if root is None else (f"{root[0]}-j {root[1]}",)
        return (*entry, *root_tail(board, self._settings, self.version, len(nodeports) > 0))

    # --- Everything ---------------------------------------------------------------------------------------------

    def resync(self, there: Listing) -> Batch:
        batch = Batch(self.version)
        wanted = self.render()
        for chain, rules in _difference(self.version, there.chains, wanted).written.items():
            found = there.chains.get(chain)
            if found is None or not is_same(rules, found):
                batch.written[chain] = rules
        for chain in sorted(there.chains.keys() - wanted.keys()):
            if chain not in there.held:
                batch.removed.append(chain)
            elif there.chains[chain]:
                batch.emptied.append(chain)
        _resync_jumps(there, batch)
        return batch


def removal(version: int, there: Listing) -> Transactions:
    """What takes all of the mode out; nothing when the rules are not ours."""
    if not there.is_ours:
        return ()
    batch = Batch(version)
    batch.jumps += [(table, f"-D {name} {rule}") for (table, name), rules in there.jumps.items() for rule in rules]
    for chain in there.chains:
        (batch.emptied if chain in there.held else batch.removed).append(chain)
    return batch.transactions()


def _difference(version: int, before: Mapping[Chain, object], after: Rendered) -> Batch:
    batch = Batch(version)
    for chain, rules in after.items():
        if isinstance(rules, tuple):
            if before.get(chain) != rules:
                batch.written[chain] = rules
        elif chain not in before:
            batch.written[chain] = rules()
    batch.removed = [chain for chain in before if chain not in after]
    return batch


def _resync_jumps(there: Listing, batch: Batch) -> None:
    """Adds the jumps that are missing, in front as kube-proxy does, and takes out those that are not ours to have."""
    wanted = hooks()
    for table in TABLES:
        for (of, chain), rules in wanted.items():
            if of != table:
                continue
            left = list(there.jumps.get((table, chain), ()))
            for rule in reversed(rules):
                same = next((each for each in left if is_same((rule,), (each,))), None)
                if same is None:
                    batch.jumps.append((table, f"-I {chain} {rule}"))
                else:
                    left.remove(same)
            batch.jumps += [(table, f"-D {chain} {rule}") for rule in left]
    for (table, chain), rules in there.jumps.items():
        if (table, chain) not in wanted:
            batch.jumps += [(table, f"-D {chain} {rule}") for rule in rules]
