"""The nftables mode: Services as elements of a constant number of maps. Plans in, nft scripts out. Pure.

    nftables_layout        tables, sets, chains, rules: the shape, and a packet's path through it
    nftables_elements      a plan as elements; which endpoint sits in which slot
    nftables_transactions  changes of elements as bounded scripts, in an order that loses no packet
    nftables_listing       what the kernel prints, read back
    nftables_tracer        a packet's way through the text, for tests and for `podwire service trace`

**Cost.** `update` compares what the changed plans put in with what they put in before, and with nothing else: one
endpoint more is one slot and one flip a frontend, one fewer the same and a slot's removal. What plans share (an address
of several ports, a chain of so many endpoints) is counted. Kept are the plans, which the model keeps too, and a text
per endpoint. The kernel's part of a change is flat, but for the check of chains when a verdict is added (0.15 µs per
Service); nft's start is most of it.

`resync` renders everything and compares it with a listing: 0.2 s for 10,000 Services, and as long again for nft to
list them. It takes slots from the kernel, so that a restart finds nothing to do.

**Versions.** A table whose mark (nftables_layout) is another gets its rules replaced in one transaction; elements stay.
One whose declarations are others, or that has no mark, is replaced as a whole, in one transaction of any size. A packet
that is on its way meanwhile finds the maps of the rules that it began with empty: one in 189 such exchanges was refused
at 65,000 new connections a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from kube_proxy_lite.model import Address, Frontend, FrontendKind, PortKey, PortPlan, Settings
from kube_proxy_lite.render.interface import Changes, ClusterIPs
from kube_proxy_lite.render.nftables_elements import (
    CHAIN,
    FLIPS,
    INTERVALS,
    Elements,
    Placed,
    Slots,
    address_text,
    base_elements,
    contribute,
    place_plan,
    place_text,
    slot_maps,
)
from kube_proxy_lite.render.nftables_layout import (
    AFFINITY,
    CHAIN_NAME,
    ENDPOINT_MAPS,
    SETS,
    UNKNOWN,
    WORDS,
    Words,
    chain_rules,
    install,
    make_chain,
    mark,
    rule_counts,
    rules,
    seconds_learned,
    sets_mark,
)
from kube_proxy_lite.render.nftables_listing import Listing, TableListing
from kube_proxy_lite.render.nftables_transactions import LIMIT, Batch, Change, Learning, Stale, Transaction

Transactions = tuple[Transaction, ...]


class NftablesRenderer:
    """interface.Renderer for nft. Before the first `resync`, nothing is returned."""

    def __init__(self, settings: Settings, versions: Sequence[int] = (4, 6), limit: int = LIMIT) -> None:
        """`versions` are the families that the kernel has; plans of others are passed over. Raises BadInterface."""
        for version in versions:
            rules(WORDS[version], settings)
        self._limit = limit
        self._tables = {version: _Table(WORDS[version], settings) for version in versions}
        self._synced = False

    def update(self, changes: Changes, cluster_ips: ClusterIPs) -> Transactions:
        """See interface.Renderer."""
        batch = Batch()
        for version, table in self._tables.items():
            plans = {key: plan for key, plan in changes.items() if key.version == version}
            addresses = {address: there for address, there in cluster_ips.items() if address.version == version}
            table.update(plans, addresses, batch if self._synced else None)
        return batch.transactions(self._limit)

    def configure(self, settings: Settings) -> Transactions:
        """See interface.Renderer. Raises BadInterface, and nothing has changed then."""
        for table in self._tables.values():
            rules(table.words, settings)
        batch = Batch()
        for table in self._tables.values():
            table.configure(settings, batch if self._synced else None)
        return batch.transactions(self._limit)

    def accept_health_checks(self, ports: Collection[int]) -> Transactions:  # noqa: ARG002
        """See interface.Renderer: our tables keep nobody out, and what another table drops ours cannot let in."""
        return ()

    def resync(self, listing: Listing) -> Transactions:
        """See interface.Renderer."""
        self._synced = True
        batch, limit = Batch(), self._limit
        for version, table in self._tables.items():
            found = listing.get(version)
            if found is not None and not table.can_keep(found):
                batch.first.append(f"delete table {table.words.table}")
                found, limit = None, 1 << 30
            table.resync(found, batch)
        return batch.transactions(limit)


class _Table:
    """One family: what is placed where, and how often what is shared is wanted."""

    def __init__(self, words: Words, settings: Settings) -> None:
        self.words = words
        self._settings = settings
        self._placed: dict[PortKey, Placed] = {}
        self._shared: Counter[tuple[str, str]] = Counter()
        self._cluster_ips: set[str] = set()

    # --- A change -----------------------------------------------------------------------------------------------

    def update(
        self, changes: Mapping[PortKey, PortPlan | None], cluster_ips: Mapping[Address, bool], batch: Batch | None
    ) -> None:
        before, after = Elements(), Elements()
        for key, plan in changes.items():
            old = self._placed.pop(key, None)
            new = None
            if plan is not None:
                new = place_plan(plan, old.cluster, old.local) if old else place_plan(plan)
                self._placed[key] = new
            if batch is not None:
                self._contribute(old, new, before, after, batch)
        for address, there in cluster_ips.items():
            self._count_address(address_text(address), there, before, after)
        if batch is None:  # everything is counted by the resync that has to come
            return
        self._diff_own(before.own, after.own, batch)
        self._diff_slots(before.slots, after.slots, batch)
        for (name, what), wanted in self._count(before.shared, after.shared).items():
            self._change_shared(name, what, wanted, batch)

    def _contribute(
        self, old: Placed | None, new: Placed | None, before: Elements, after: Elements, batch: Batch
    ) -> None:
        if old is not None:
            contribute(old, self._settings, before)
            if old.plan.affinity:
                batch.stale += _forget(self.words.table, old, new)
        if new is not None:
            contribute(new, self._settings, after)

    def configure(self, settings: Settings, batch: Batch | None) -> None:
        old, self._settings = self._settings, settings
        if batch is None:
            return
        if rules(self.words, old) != rules(self.words, settings):
            batch.first += install(self.words, settings)
        version = self.words.version
        self._diff_own(base_elements(old, version), base_elements(settings, version), batch)

    def _count_address(self, text: str, there: bool, before: Elements, after: Elements) -> None:
        if there and text not in self._cluster_ips:
            self._cluster_ips.add(text)
            after.shared["cluster_ips", text] += 1
        elif not there and text in self._cluster_ips:
            self._cluster_ips.remove(text)
            before.shared["cluster_ips", text] += 1

    def _count(self, before: Counter[tuple[str, str]], after: Counter[tuple[str, str]]) -> dict[tuple[str, str], bool]:
        """What is wanted now and was not before (True), or the other way round (False)."""
        changed = {}
        for item in before.keys() | after.keys():
            was = self._shared[item]
            now = was - before[item] + after[item]
            if now:
                self._shared[item] = now
            else:
                del self._shared[item]
            if bool(was) != bool(now):
                changed[item] = bool(now)
        return changed

    def _change_shared(self, name: str, key: str, there: bool, batch: Batch) -> None:
        if name == CHAIN:
            if there:
                self._make_chain(key, batch, batch.chains)
            else:
                batch.last.append(f"delete chain {self.words.table} {key}")
        else:
            self._change(name, key, None if there else "", "" if there else None, batch)

    def _make_chain(self, name: str, batch: Batch, commands: list[str]) -> None:
        commands += make_chain(self.words, name, chain_rules(self.words, name))
        if seconds := seconds_learned(self.words, name):
            batch.learning[f"add chain {self.words.table} {name}"] = Learning(self.words.version, name, seconds)

    def _diff_own(
        self, before: Mapping[tuple[str, str], str], after: Mapping[tuple[str, str], str], batch: Batch
    ) -> None:
        for (name, key), value in before.items():
            new = after.get((name, key))
            if new is None:
                # others may come that overlap with it, unless the whole place is closed no more
                early = name in INTERVALS and (name != "sources" or ("closed", key.rpartition(" . ")[0]) in after)
                self._change(name, key, value, None, batch, early)
            elif new != value:
                self._change(name, key, value, new, batch)
        for (name, key), value in after.items():
            if (name, key) not in before:
                self._change(name, key, None, value, batch)

    def _diff_slots(
        self, before: Mapping[tuple[str, str], Slots], after: Mapping[tuple[str, str], Slots], batch: Batch
    ) -> None:
        for (name, key), slots in before.items():
            new = after.get((name, key), ())
            if slots == new:
                continue
            for slot, endpoint in enumerate(slots):
                now = new[slot] if slot < len(new) else None
                if now != endpoint:
                    self._change(name, f"{key} . {slot}", endpoint, now, batch)
        for (name, key), slots in after.items():
            there = len(before.get((name, key), ()))
            for slot in range(there, len(slots)):
                self._change(name, f"{key} . {slot}", None, slots[slot], batch)

    def _change(self, name: str, key: str, old: str | None, new: str | None, batch: Batch, early: bool = False) -> None:
        change = Change(self.words.table, name, key, old, new)
        if name in FLIPS:
            batch.flips.append(change)
        elif new is None and not early:
            batch.removals.append(change)
        else:
            batch.referred.append(change)

    # --- Everything ---------------------------------------------------------------------------------------------

    def can_keep(self, listing: TableListing) -> bool:
        """Whether the elements of a table can stay: it was made from the same declarations, and has them all."""
        ours = mark(self.words, self._settings)
        return sets_mark(listing.mark) == sets_mark(ours) and listing.sets.keys() >= SETS[self.words.version]

    def resync(self, listing: TableListing | None, batch: Batch) -> None:
        fresh = listing is None
        there = TableListing() if listing is None else listing
        wanted = self._render(there)
        self._resync_chains(wanted, there, fresh, batch)
        sets: dict[str, dict[str, str]] = {name: {} for name in SETS[self.words.version] - {AFFINITY}}
        for (name, key), value in wanted.own.items():
            sets[name][key] = value
        for (name, key), slots in wanted.slots.items():
            elements = sets[name]
            for slot, endpoint in enumerate(slots):
                elements[f"{key} . {slot}"] = endpoint
        for name, key in wanted.shared:
            if name != CHAIN:
                sets[name][key] = ""
        for name in sorted(sets):
            self._resync_set(name, there.sets.get(name, {}), sets, batch)
        batch.stale += self._stale(there.sets.get(AFFINITY, {}))

    def _render(self, there: TableListing) -> Elements:
        """All elements, with endpoints in the slots in which the listing has them."""
        by_place = _slots_by_place(there)
        wanted = Elements()
        for key, placed in self._placed.items():
            if by_place:
                placed = self._placed[key] = _adopt(placed, by_place)
            contribute(placed, self._settings, wanted)
        for address in self._cluster_ips:
            wanted.shared["cluster_ips", address] += 1
        self._shared = Counter(wanted.shared)
        wanted.own.update(base_elements(self._settings, self.words.version))
        return wanted

    def _resync_chains(self, wanted: Elements, there: TableListing, fresh: bool, batch: Batch) -> None:
        words, settings = self.words, self._settings
        counts = {name: len(lines) for name, lines in there.chains.items()}
        same_rules = there.mark == mark(words, settings)
        needed = {name for kind, name in wanted.shared if kind == CHAIN}
        constant = rule_counts(words, settings)
        if not same_rules or any(counts.get(name) != count for name, count in constant.items()):
            batch.first += install(words, settings)
            if fresh:  # an address that is known already, and its port not yet, must not be refused
                batch.first.append(f"flush chain {words.table} {UNKNOWN}")
                batch.finish += make_chain(words, UNKNOWN, rules(words, settings)[UNKNOWN])
        for name in sorted(needed):
            lines = chain_rules(words, name)
            if not same_rules or counts.get(name) != len(lines):
                self._make_chain(name, batch, batch.first if fresh else batch.chains)
        for name in sorted(there.chains.keys() - needed - constant.keys()):
            if CHAIN_NAME.fullmatch(name):
                batch.last.append(f"delete chain {words.table} {name}")

    def _resync_set(
        self, name: str, there: Mapping[str, str], sets: Mapping[str, Mapping[str, str]], batch: Batch
    ) -> None:
        wanted = sets[name]
        for key, value in there.items():
            if key not in wanted:
                early = name in INTERVALS and (name != "sources" or key.rpartition(" . ")[0] in sets["closed"])
                self._change(name, key, value, None, batch, early)
        for key, value in wanted.items():
            old = there.get(key)
            if old != value:
                self._change(name, key, old, value, batch)

    def _stale(self, affinity: Mapping[str, str]) -> list[Stale]:
        """What is remembered, and leads where it should not."""
        if not affinity:
            return []
        allowed: dict[str, set[str]] = {}
        for placed in self._placed.values():
            if placed.plan.affinity:
                for frontend in placed.plan.frontends:
                    endpoints = {endpoint for _, endpoint in _choices(placed, frontend)}
                    allowed[place_text(frontend, placed.plan)] = endpoints
        found: dict[str, set[str]] = {}
        for key, endpoint in affinity.items():
            _, place = key.split(" . ", 1)
            if place not in allowed and (port := place.split(" . ", 1)[1]) in allowed:
                place = port
            if endpoint not in allowed.get(place, ()):
                found.setdefault(place, set()).add(endpoint)
        return [Stale(self.words.table, place, frozenset(endpoints)) for place, endpoints in found.items()]


def _forget(table: str, old: Placed, new: Placed | None) -> list[Stale]:
    """What clients of a plan with affinity must not be sent back to."""
    frontends = {place_text(each, new.plan): each for each in new.plan.frontends} if new and new.plan.affinity else {}
    found = []
    for frontend in old.plan.frontends:
        place = place_text(frontend, old.plan)
        now = frontends.get(place)
        if new is None or now is None:
            found.append(Stale(table, place, frozenset()))
        elif gone := _choices(old, frontend) - _choices(new, now):
            found.append(Stale(table, place, frozenset(endpoint for _, endpoint in gone)))
    return found


def _choices(placed: Placed, frontend: Frontend) -> set[tuple[str, str]]:
    """The endpoints that a frontend may lead to, with for whom: everybody, or clients inside and outside."""
    if frontend.kind is FrontendKind.CLUSTER_IP:
        return {("all", endpoint) for endpoint in (placed.local if frontend.local else placed.cluster)}
    outside = placed.local if frontend.local else placed.cluster
    return {("inside", each) for each in placed.cluster} | {("outside", each) for each in outside}


def _slots_by_place(listing: TableListing) -> dict[tuple[str, str], dict[int, str]]:
    """(map, key without the slot) → slot → endpoint, as the kernel has them."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for name in ENDPOINT_MAPS:
        for key, endpoint in listing.sets.get(name, {}).items():
            place, _, slot = key.rpartition(" . ")
            found.setdefault((name, place), {})[int(slot)] = endpoint
    return found


def _adopt(placed: Placed, there: Mapping[tuple[str, str], Mapping[int, str]]) -> Placed:
    """The plan with its endpoints where they are already; all its frontends have them in the same slots."""
    maps = [slot_maps(frontend, placed.plan) for frontend in placed.plan.frontends]
    cluster = next((there[of_cluster] for of_cluster, _ in maps if of_cluster in there), placed.cluster)
    local = next((there[of_local] for _, of_local in maps if of_local in there), placed.local)
    return place_plan(placed.plan, cluster, local)
