"""The fast path in the kernel: which ports and devices have its programs, and which pods it knows.

    every 2 s    onlookers ─▶ programs at devices and ports ─▶ pods in the map ─▶ lease    (fastpath_keeper.py)
    0.1 s later  onlookers ─▶ programs at a few of the ports that are new, until there are no more of them
    DEL          the pod leaves the map before its wire is killed                          2 µs an address

It is no part of a pod's network, which is whole without it: an ADD waits for none of it, and what fails of it is said
in the status and tried again. A pod is known as long as the bridge forwards for its port and nobody else looks at the
port's packets: from the next round on where the place for filters was made with its port (wires.py), and otherwise some
seconds after its ADD, when plugins that follow in the chain have done what they do. There the program comes by TCX, for
which the kernel takes ten milliseconds. No place is ever made at a link that is in use, since that costs packets (ADR
0009).

The programs stay with ports and VXLAN device when the daemon ends, and pass everything on when its lease has run out,
half a minute later: until then nothing of what they know can become wrong, since addresses are given by the daemon
alone. The next daemon ends them before it answers anybody, and puts its own there. The underlay's interfaces, which are
somebody else's, have ours for as long as the daemon lives, and where packets of pods come by them: with the backends
`direct` and `auto`.

A round costs 10 ms with 250 pods, nearly all of it the question who else is at each port: what comes between two rounds
asks that of new ports alone. What the programs are made for (devices, pools, blocks) seldom changes; then new ones are
put in the place of the old, without a packet in between.

Conntrack does not see what goes the fast way, and would take the end of such a connection for a stranger's packet:
nf_conntrack_tcp_be_liberal is set while there is a fast path, and nf_conntrack_tcp_ignore_invalid_rst, for a reset
after more than 2 GB that it has not seen.

Every function here runs on the netlink thread, but for those that say otherwise.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import struct
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import ExitStack

import msgspec

from ipam_daemon import tc_program
from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.fastpath_program import (
    COUNT_BYTES,
    FROM_NODE,
    KEY_BYTES,
    LEASE_BYTES,
    POD_BYTES,
    TO_NODE,
    TO_POD,
    Conntrack,
    Maps,
    Node,
    Where,
    pod_key,
    pod_value,
    render,
    render_nothing,
)
from ipam_daemon.links import get_link, read_link
from ipam_daemon.model import Attachment, Network
from ipam_daemon.netlink import NetlinkThread, index_of, naming, read_sysctl, tolerating, write_sysctl
from ipam_daemon.onlookers import Onlookers, between_nodes
from ipam_daemon.plan import VXLAN, NodePlan
from podwire.bpf import kernel, tcx
from podwire.bpf.btf import BtfError
from podwire.errors import PodwireError

LEASE_S = 30.0
"""How long the programs go on without a daemon."""
_MOST_ADDRESSES = 1 << 13
_AT_A_TIME = 16
_GONE = (errno.ENOENT, errno.EINVAL, errno.ENODEV)
_MONOTONIC_COARSE = 6  # linux/time.h
_WAYS = {"pod": TO_POD, "node": TO_NODE, "from-node": FROM_NODE}
_LIBERAL = "net/netfilter/nf_conntrack_tcp_be_liberal"
_RESETS = "net/netfilter/nf_conntrack_tcp_ignore_invalid_rst"  # Linux 5.14
_TCP_LASTS = "net/netfilter/nf_conntrack_tcp_timeout_established"
_UDP_LASTS = "net/netfilter/nf_conntrack_udp_timeout_stream"
_TUPLE = "nf_conntrack_tuple"
_NAMES = frozenset(where.value for where in Where)


def _collapsed(networks: Iterable[Network]) -> tuple[Network, ...]:
    """The same addresses in the fewest networks, sorted."""
    four = ipaddress.collapse_addresses(each for each in networks if each.version == 4)
    six = ipaddress.collapse_addresses(each for each in networks if each.version == 6)
    return (*four, *six)


class Unsupported(PodwireError):
    """The kernel has no fast path; the message says what is missing."""


class _Place(msgspec.Struct, frozen=True):
    """What runs at a link: which program, what for, and whether as a filter, or by TCX."""

    where: Where
    node: Node | None
    filtered: bool


class _Port(msgspec.Struct, frozen=True):
    """A pod that the programs know: its port, and its keys in the map."""

    ifindex: int
    keys: tuple[bytes, ...]


def read_conntrack() -> tuple[Conntrack, tuple[int, ...]]:
    """What programs have to know of the running kernel, and descriptors of the modules' BTF, which the caller closes.

    50 ms, on any thread. Raises Unsupported.
    """
    modules: tuple[int, ...] = ()
    try:
        types = kernel.read_btf()
        module = kernel.read_module_btf("nf_conntrack", types)
        if module is not None:
            types, descriptor = module
            modules = (descriptor,)
        one = types.offset("nf_conntrack_tuple_hash", "tuple")
        size = types.size("nf_conntrack_tuple_hash")
        tuples = types.offset("nf_conn", "tuplehash")
        extension = types.enumerator("nf_ct_ext_id", "NF_CT_EXT_TIMEOUT")
        answers, asked = tuples + size + one, tuples + one
        return Conntrack(
            lookup=types.function("bpf_skb_ct_lookup"),
            renew=types.function("bpf_ct_change_timeout"),
            release=types.function("bpf_ct_release"),
            module=len(modules),
            status=types.offset("nf_conn", "status"),
            timeout=types.offset("nf_conn", "timeout"),
            tcp_state=types.offset("nf_conn", "proto.tcp.state"),
            original_to=(asked + types.offset(_TUPLE, "dst.u3"), asked + types.offset(_TUPLE, "dst.u")),
            reply_from=(answers + types.offset(_TUPLE, "src.u3"), answers + types.offset(_TUPLE, "src.u")),
            extensions=types.offset("nf_conn", "ext"),
            own_timeout=None if extension is None else types.offset("nf_ct_ext", "offset") + extension,
            hz=round(1 / time.clock_getres(_MONOTONIC_COARSE)),  # a jiffy is what that clock counts
        ), modules
    except (BtfError, OSError) as error:
        for descriptor in modules:
            os.close(descriptor)
        why = f"the kernel's BTF: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise Unsupported(why) from error


def end(thread: NetlinkThread) -> None:
    """Ends what an earlier daemon has left: its programs know pods that nobody tells them of any more.

    For the start, before a DEL is answered. 0.1 ms a port: filters go, and their place stays, since to take that away
    costs packets; a program of TCX gets one in its place that passes everything on, since to take it away takes the
    kernel ten milliseconds a port. Raises PlumbingFailed, OSError.
    """
    onlookers = Onlookers(thread)
    for index in onlookers.with_filters():
        if onlookers.filters(index) & _NAMES:
            with naming(f"taking the fast path from link {index}"), tolerating(*_GONE):
                thread.channel.exchange([tc_program.delete_program(index)])
    for index in _with_programs(onlookers):
        _pass_on(index)


def _pass_on(ifindex: int) -> None:
    nothing = kernel.load(render_nothing(), Where.FROM_POD.value)
    try:
        with naming(f"ending the fast path of link {ifindex}"), tolerating(*_GONE):
            tcx.attach(nothing, ifindex, _NAMES)
    finally:
        os.close(nothing)


def remove(thread: NetlinkThread) -> None:
    """Takes all of it away, where none is wanted any more. Raises PlumbingFailed, OSError."""
    for index in _with_programs(Onlookers(thread)):
        with naming(f"taking the fast path from link {index}"), tolerating(*_GONE):
            tcx.detach(index, _NAMES)


def _with_programs(onlookers: Onlookers) -> list[int]:
    return [index for index in onlookers.links() if not _NAMES.isdisjoint(tcx.programs(index, tcx.Way.IN).values())]


class FastPath:
    """The fast path of this node."""

    def __init__(self, thread: NetlinkThread, conntrack: Conntrack, modules: tuple[int, ...]) -> None:
        """Takes over what `read_conntrack` has found, also when it raises PlumbingFailed."""
        self._thread = thread
        self._conntrack = conntrack
        self._modules = modules
        array, per_cpu, ways = kernel.MapKind.ARRAY, kernel.MapKind.ARRAY_PER_CPU, len(_WAYS)
        with naming("making eBPF maps"), ExitStack() as undoing:
            for descriptor in modules:
                undoing.callback(os.close, descriptor)
            self._pods = kernel.Map(
                kernel.MapKind.HASH, key=KEY_BYTES, value=POD_BYTES, entries=_MOST_ADDRESSES, name="podwire_pods"
            )
            undoing.callback(self._pods.close)
            self._lease = kernel.Map(array, key=4, value=LEASE_BYTES, entries=1, name="podwire_lease")
            undoing.callback(self._lease.close)
            self._by_tcx = tcx.is_supported()
            self._counts = kernel.Map(per_cpu, key=4, value=COUNT_BYTES, entries=ways, name="podwire_ways")
            undoing.pop_all()
        self._node: Node | None = None  # what the programs are for
        self._programs: dict[Where, int] = {}
        self._ports: dict[str, _Port] = {}
        self._waiting: dict[str, Attachment] = {}  # wires whose ports the last round left for later
        self._attached: dict[int, _Place] = {}  # by ifindex
        self._links: dict[int, int] = {}  # the underlay's, by ifindex
        self._onlookers: Onlookers | None = None  # of the last whole round
        self._left_alone: dict[str, str] = {}  # as far as the round has come
        self.passed_over: Mapping[str, str] = {}
        """Ports and devices that the last round has left alone, each with why. On any thread."""

    @property
    def known(self) -> int:
        """How many pods the programs know. On any thread."""
        return len(self._ports)

    # --- what is asked of it

    def ensure(self, plan: NodePlan, wires: Sequence[Attachment], young: Set[str]) -> bool:
        """Brings the kernel to what the plan and the wires say. False when there is more to do, which others need not
        wait for: `go_on` does it. To the ports of `young` wires other plugins may yet do something.

        Raises PlumbingFailed, OSError.
        """
        self._onlookers = onlookers = Onlookers(self._thread)
        self._left_alone = {}
        direct = self._direct(plan)
        self._ensure_programs(plan, direct)
        write_sysctl(_LIBERAL, "1")
        if read_sysctl(_RESETS):
            write_sysctl(_RESETS, "1")
        self._ensure_devices(onlookers, direct)
        self._look_at_ports(onlookers, {each.host_ifname: each for each in wires if not each.bandwidth}, young)
        done = self._take_some(onlookers)
        until = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(LEASE_S * 1e9)
        self._lease.put(struct.pack("=I", 0), struct.pack("=Q", until))
        return done

    def go_on(self) -> bool:
        """Takes a few of the ports that the last round left. False when there are more. Raises PlumbingFailed,
        OSError."""
        return self._take_some(Onlookers(self._thread, self._onlookers))

    def forget(self, host_ifname: str) -> None:
        """No packet takes the fast way to or from this port any more. One that is not known is fine."""
        self._waiting.pop(host_ifname, None)
        port = self._ports.get(host_ifname)
        if port is not None:
            for key in port.keys:
                self._pods.remove(key)
            del self._ports[host_ifname]

    def taken(self) -> dict[str, int]:
        """Packets that took the fast way, by which. Raises OSError."""
        found = {}
        for name, place in _WAYS.items():
            values = self._counts.get(struct.pack("=I", place)) or b""
            found[name] = sum(number for (number,) in struct.iter_unpack("=Q", values))
        return found

    def close(self) -> None:
        """Closes what is open; the underlay's interfaces are as they were then."""
        for descriptor in (*self._links.values(), *self._programs.values(), *self._modules):
            os.close(descriptor)
        for each in (self._pods, self._lease, self._counts):
            each.close()

    # --- programs

    def _direct(self, plan: NodePlan) -> frozenset[str]:
        """The underlay's interfaces by which packets of pods come and go themselves."""
        routes = plan.peers.routes.values() if plan.peers else ()
        return frozenset(route.device for route in routes) - {VXLAN}

    def _ensure_programs(self, plan: NodePlan, direct: Iterable[str]) -> None:
        """Loads programs for what the node is now, and puts them where its old ones are."""
        devices = [VXLAN, *sorted(direct)]
        why = between_nodes(self._thread.channel)
        if why:
            self._left_alone[" and ".join(devices)] = why
            devices = []
        node = Node(
            bridge=index_of(plan.bridge.name),
            bridge_mac=plan.bridge.mac,
            pools=plan.bridge.pools,
            blocks=_collapsed(plan.firewall.local_blocks),
            vxlan=index_of(VXLAN) if devices else 0,
            underlay=tuple(index for index in map(index_of, devices[1:]) if index and self._is_ethernet(index)),
            tcp_lasts=int(read_sysctl(_TCP_LASTS) or 0),
            udp_lasts=int(read_sysctl(_UDP_LASTS) or 0),
        )
        if node == self._node:
            return
        maps = Maps(pods=self._pods.descriptor, lease=self._lease.descriptor, counts=self._counts.descriptor)
        made: dict[Where, int] = {}
        try:
            for where in Where:
                made[where] = kernel.load(render(where, self._conntrack, maps, node), where.value, self._modules)
        except BaseException as error:
            for program in made.values():
                os.close(program)
            if isinstance(error, OSError):
                raise PlumbingFailed(str(error)) from error
            raise
        for program in self._programs.values():
            os.close(program)
        self._programs, self._node = made, node  # each port gets its new one in this round
        for index, link in list(self._links.items()):
            try:
                kernel.exchange_program(link, made[Where.ARRIVING])
            except OSError:  # its interface is gone
                os.close(self._links.pop(index))

    def _is_ethernet(self, ifindex: int) -> bool:
        """Others have frames of another shape (WireGuard's, say), or none."""
        (link,) = self._thread.channel.exchange([get_link(ifindex)])
        return read_link(link).is_ethernet

    def _attach(self, ifindex: int, ifname: str, where: Where, onlookers: Onlookers) -> bool:
        """Runs the program for what a link of ours takes in. False where the kernel cannot."""
        filtered = onlookers.has_filters(ifindex) and not (where is Where.ARRIVING and self._by_tcx)
        place = _Place(where, self._node, filtered)
        if self._attached.get(ifindex) == place:
            return True
        try:
            with naming(f"fast path of {ifname}"):
                self._put(ifindex, self._programs[where], place)
        except Unsupported as error:
            self._left_alone[ifname] = str(error)
            return False
        self._attached[ifindex] = place
        return True

    def _put(self, ifindex: int, program: int, place: _Place) -> None:
        if place.filtered:
            try:
                self._thread.channel.exchange([tc_program.set_program(ifindex, program, place.where.value)])
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
                    raise Unsupported("the kernel has no cls_bpf, not as a module either") from error
                raise
            tcx.detach(ifindex, _NAMES)  # there was no place for filters then
            return
        try:
            tcx.attach(program, ifindex, _NAMES)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise Unsupported("it has no place for filters, and TCX is of Linux 6.6") from error
            raise

    def _detach(self, ifindex: int, ifname: str) -> None:
        """The same no more, wherever the link has gone."""
        place = self._attached.pop(ifindex, None)
        if place is not None:
            with naming(f"fast path of {ifname}"), tolerating(*_GONE):
                if place.filtered:
                    self._thread.channel.exchange([tc_program.delete_program(ifindex)])
                else:
                    tcx.detach(ifindex, _NAMES)

    # --- where they are

    def _ensure_devices(self, onlookers: Onlookers, direct: Iterable[str]) -> None:
        underlay, vxlan = (self._node.underlay, self._node.vxlan) if self._node else ((), 0)
        if not vxlan or self._is_watched(onlookers, vxlan, VXLAN, sends=False):
            self._detach(index_of(VXLAN), VXLAN)
        else:
            self._attach(vxlan, VXLAN, Where.ARRIVING, onlookers)
        wanted = {
            index: name
            for name in direct
            if (index := index_of(name)) in underlay and not self._is_watched(onlookers, index, name, sends=False)
        }
        for index in self._links.keys() - wanted.keys():
            os.close(self._links.pop(index))
        for index in wanted.keys() - self._links.keys():
            try:
                self._links[index] = kernel.attach_while_open(self._programs[Where.ARRIVING], index)
            except OSError as error:
                why = "TCX is of Linux 6.6" if error.errno == errno.EINVAL else error.strerror
                self._left_alone[wanted[index]] = f"what arrives takes the long way: {why}"

    def _is_watched(self, onlookers: Onlookers, ifindex: int, ifname: str, *, sends: bool) -> bool:
        why = onlookers.of(ifindex, ifname, sends=sends)
        if not why:
            found = onlookers.programs(ifindex, sends=sends)
            if found - _NAMES:
                why = "it has filters or programs of somebody else"
            if not found & _NAMES:  # somebody took ours away
                self._attached.pop(ifindex, None)
        if why:
            self._left_alone[ifname] = why
        return bool(why)

    def _look_at_ports(self, onlookers: Onlookers, wanted: dict[str, Attachment], young: Set[str]) -> None:
        """Takes the programs from known ports that are somebody else's business now, and finds the new ones."""
        for name, port in list(self._ports.items()):
            there = name in wanted and onlookers.is_there(port.ifindex)
            if not (
                there and self._forwards(onlookers, port.ifindex, name) and self._guide(onlookers, port.ifindex, name)
            ):
                self.forget(name)
        present = {port.ifindex for port in self._ports.values()} | {index_of(VXLAN)}
        self._attached = {index: where for index, where in self._attached.items() if index in present}
        self._waiting = {
            name: wire
            for name, wire in wanted.items()
            if name not in self._ports and (name not in young or onlookers.has_filters(index_of(name)))
        }

    def _take_some(self, onlookers: Onlookers) -> bool:
        """Takes a few new ports; False when there may be more."""
        admitted = 0
        for name, wire in list(self._waiting.items()):
            if admitted >= _AT_A_TIME:
                break
            del self._waiting[name]
            index = index_of(name)
            if index and self._forwards(onlookers, index, name) and self._guide(onlookers, index, name):
                self._admit(name, index, wire)
                admitted += 1 if onlookers.has_filters(index) else _AT_A_TIME
        self.passed_over = dict(self._left_alone)
        return not self._waiting

    def _guide(self, onlookers: Onlookers, ifindex: int, ifname: str) -> bool:
        """Has what a pod's port takes in meet the program, where it is nobody else's business; whether it does. A port
        that fails is left alone, and no other waits for it."""
        try:
            return not self._is_watched(onlookers, ifindex, ifname, sends=True) and self._attach(
                ifindex, ifname, Where.FROM_POD, onlookers
            )
        except (PlumbingFailed, OSError) as error:
            self._left_alone[ifname] = str(error)
            return False

    def _forwards(self, onlookers: Onlookers, ifindex: int, ifname: str) -> bool:
        """Whether the bridge does what the program is to do in its place."""
        try:
            forwarded = self._node is not None and onlookers.is_forwarded(ifindex, self._node.bridge)
        except OSError:  # it is gone since
            return False
        if not forwarded:
            self._left_alone[ifname] = "the bridge does not forward for it"
        return forwarded

    def _admit(self, name: str, ifindex: int, wire: Attachment) -> None:
        port = _Port(ifindex, tuple(pod_key(each.ip) for each in wire.addresses))
        self._ports[name] = port
        for key in port.keys:
            self._pods.put(key, pod_value(ifindex, wire.mac))
