"""The queues of limited wires in the kernel. What they are is ipam_daemon/bandwidth.py's.

    ADD   between making the pair and raising the pod's end: no packet passes before its limit is there    1 ms
    DEL   the ifb devices join the group of dead wires, and are deleted with it                            0.05 ms
    each round of reconciling: a queue that somebody took, set down or led nobody to is made again; devices and chains
    whose wire is gone, go

Every function here runs on the netlink thread.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable

from msgspec.structs import replace
from pyroute2.netlink.exceptions import NetlinkError

from ipam_daemon import tc
from ipam_daemon.bandwidth import Queue, queue_names, queues, wire_of
from ipam_daemon.errors import PlumbingFailed
from ipam_daemon.links import get_link, list_links, read_link
from ipam_daemon.model import Attachment, Bandwidth
from ipam_daemon.netlink import NetlinkThread, index_of, naming, tolerating
from ipam_daemon.rtnl import Message, raise_link

_SUPPORTED_SINCE = "it needs CONFIG_IFB, CONFIG_NET_SCH_TBF and CONFIG_NFT_FWD_NETDEV, and Linux 5.17"
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOENT)


class Shaper:
    """The queues of this node's wires."""

    def __init__(self, thread: NetlinkThread) -> None:
        self._thread = thread

    def limit(self, attachment: Attachment) -> None:
        """Makes the queues of a wire, whose end on the node exists. Raises PlumbingFailed."""
        wanted = queues(attachment)
        if not wanted:
            return
        channel = self._thread.channel
        with naming(f"queues of {attachment.host_ifname}"):
            channel.exchange([tc.make_ifb(queue.ifname) for queue in wanted])
            indices = {queue: index_of(queue.ifname) for queue in wanted}
            channel.exchange(
                [each for queue, i in indices.items() for each in (tc.add_bucket(i, queue.bucket), raise_link(i))]
            )
        self._redirect(attachment.host_ifname, indices)

    def _redirect(self, host_ifname: str, indices: dict[Queue, int]) -> None:
        try:
            redirects = [tc.Redirect(link=host_ifname, egress=each.to_pod, to=index) for each, index in indices.items()]
            self._thread.nftables.carry_out(tc.TABLE, tc.lead(redirects))
        except OSError as error:
            why = f": {_SUPPORTED_SINCE}" if error.errno in _UNSUPPORTED else ""
            raise PlumbingFailed(
                f"limiting {host_ifname}: {errno.errorcode.get(error.errno or 0)}: {error.strerror}{why}"
            ) from error

    def resize(self, attachment: Attachment, mtu: int) -> None:
        """Fits the queues of a wire to another MTU, in bytes, where they were made for the one that it has; no packet
        is lost. What is not as it was made is left to the next round."""
        before, after = (replace(attachment, mtu=each, resizing=0) for each in (attachment.mtu, mtu))
        for known, wanted in zip(queues(before), queues(after), strict=True):
            index = index_of(wanted.ifname)
            if index and wanted != known:
                change = replace(tc.add_bucket(index, wanted.bucket), flags=0)  # of the one that is there
                with naming(f"queue of {wanted.ifname}"), tolerating(errno.ENODEV, errno.ENOENT, errno.EINVAL):
                    self._thread.channel.exchange([change])

    def doom(self, host_ifname: str, group: int) -> list[Message]:
        """The messages that put a wire's ifb devices into the group of links to delete; none when it has none."""
        return [tc.join_group(index, group) for index in map(index_of, queue_names(host_ifname)) if index]

    def is_gone(self, host_ifname: str) -> bool:
        """Whether neither ifb device of a wire is there."""
        return not any(map(index_of, queue_names(host_ifname)))

    def delete(self, host_ifname: str) -> None:
        """Deletes a wire's devices and chains at once. A device that is gone is fine; a wire without any has no
        chains."""
        if self._delete_devices(host_ifname):
            self._drop_chains(lambda link: link == host_ifname)

    def _delete_devices(self, host_ifname: str) -> bool:
        """False when there were none."""
        indices = {ifname: index for ifname in queue_names(host_ifname) if (index := index_of(ifname))}
        for ifname, index in indices.items():
            with naming(f"deleting {ifname}"), tolerating(errno.ENODEV):
                self._thread.host.link("del", index=index)
        return bool(indices)

    def sweep_chains(self) -> None:
        """Deletes the chains of links that are gone. For after their deletion."""
        self._drop_chains(lambda link: not index_of(link))

    def _drop_chains(self, is_dropped: Callable[[str], bool]) -> None:
        """Deletes the chains of such links."""
        with naming(f"table {tc.TABLE}"), tolerating(errno.ENOENT):
            chains = [chain for chain in self._chains() if is_dropped(chain.partition("_")[2])]
            self._thread.nftables.carry_out(tc.TABLE, tc.drop_chains(chains))

    def _chains(self) -> frozenset[str]:
        return frozenset(self._thread.nftables.chains(tc.TABLE))

    def strays(self, known: Iterable[str]) -> tuple[str, ...]:
        """Wires that are gone and left a device. `known` are the names of those that somebody still has."""
        wires = set(known)
        with naming("listing ifb devices"):
            found = {wire_of(read_link(each).name) for each in self._thread.channel.dump(list_links("ifb"))}
        return tuple(sorted(wire for wire in found - {""} if wire not in wires and not index_of(wire)))

    # --- reading back

    def differences(self, attachment: Attachment) -> list[str]:
        """What of the limits is not as asked for, in words; empty when all is well."""
        wanted = queues(attachment)
        if not wanted:
            return []
        with naming(f"rules of {tc.TABLE}"):
            rules = Counter(chain for chain, _ in self._thread.nftables.rules(tc.TABLE))
        found = []
        for queue in wanted:
            way = "to the pod" if queue.to_pod else "from the pod"
            there = self._bucket(queue.ifname)
            if there is None:
                found.append(f"{queue.ifname}, which limits packets {way}, is gone or has no token bucket")
            elif not queue.bucket.is_reported_as(there.rate, there.ticks):
                found.append(
                    f"{queue.ifname} limits packets {way} to {there.rate * 8} bit/s with a burst of "
                    f"{there.as_bucket().burst * 8} bits, expected {queue.bucket.rate * 8} and {queue.bucket.burst * 8}"
                )
            if there is not None and not self._is_up(queue.ifname):
                found.append(f"{queue.ifname}, which limits packets {way}, is down: none passes")
            if rules[tc.Redirect(link=attachment.host_ifname, egress=queue.to_pod, to=0).chain] != 1:
                found.append(f"packets {way} are not led to {queue.ifname}, or not by its rule alone")
        return found

    def mend(self, attachment: Attachment) -> bool:
        """Makes the queues of a wire again if something of them is not right. True when it was not."""
        if not self.differences(attachment):
            return False
        self._delete_devices(attachment.host_ifname)
        self._drop_chains(lambda link: link == attachment.host_ifname)
        self.limit(attachment)
        return True

    def recall(self, host_ifname: str) -> Bandwidth:
        """The limits that the kernel has for a wire, for a journal that was lost."""
        to_pod, from_pod = (self._bucket(ifname) for ifname in queue_names(host_ifname))
        ingress = to_pod.as_bucket() if to_pod else None
        egress = from_pod.as_bucket() if from_pod else None
        return Bandwidth(
            ingress_rate=8 * ingress.rate if ingress else 0,
            ingress_burst=8 * ingress.burst if ingress else 0,
            egress_rate=8 * egress.rate if egress else 0,
            egress_burst=8 * egress.burst if egress else 0,
        )

    def _is_up(self, ifname: str) -> bool:
        index, answers = index_of(ifname), list[bytes]()
        if index:
            with naming(f"looking at {ifname}"), tolerating(errno.ENODEV):
                answers = self._thread.channel.exchange([get_link(index)])
        return any(read_link(answer).is_up for answer in answers)

    def _bucket(self, ifname: str) -> tc.Found | None:
        index = index_of(ifname)
        if not index:
            return None
        try:
            (answer,) = self._thread.channel.exchange([tc.get_bucket(index)])
        except (NetlinkError, OSError):
            return None
        return tc.read_bucket(answer)
