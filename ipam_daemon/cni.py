"""CNI, pure: what the runtime sent becomes a `Call`, what was done becomes the JSON of the version that it speaks.

    CallRequest ─▶ parse() ─▶ Call ─▶ (the daemon acts) ─▶ Attachment ─▶ result() ─▶ stdout bytes
                       └──────────── CniError ───────────────────────▶ error()  ─▶ stdout bytes

Source: the CNI specification 1.1.0 (section numbers in the docstrings) and its predecessors down to 0.3.1. Between them
only the shape of the result differs: up to 0.4.0 every address says its family in `version`; `mtu` of an interface
came with 1.1.0. Unknown keys of a configuration belong to someone else and are passed over. Null is as absent
wherever a key has it: Go's plugins take it so.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ipam_daemon import bandwidth, hostports
from ipam_daemon.errors import (
    CniError,
    IncompatibleVersion,
    InvalidConfig,
    InvalidEnvironment,
    UndecodableConfig,
    UnsupportedField,
    code_of,
)
from ipam_daemon.model import (
    Address,
    Attachment,
    AttachmentKey,
    Bandwidth,
    Network,
    PodRef,
    PortMapping,
    host_mac,
)

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
DEFAULT_ROUTE = {4: "0.0.0.0/0", 6: "::/0"}
_UNSAID_VERSION = "0.2.0"  # of a configuration without cniVersion
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*\Z")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
# In a name of an interface the kernel takes 0xa0 for a space (lib/ctype.c), and completes % to another name.
_IFNAME_FORBIDDEN = re.compile(rb"[/:%\0 \t\n\r\v\f\xa0]")
COMMANDS = {  # the version that brought each command (CNI 1.1.0, section 2)
    "ADD": "0.3.1",
    "DEL": "0.3.1",
    "CHECK": "0.4.0",
    "GC": "1.1.0",
    "STATUS": "1.1.0",
}
_K8S_ARGS = {"K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_UID", "K8S_POD_INFRA_CONTAINER_ID", "IP", "MAC"}


class Dns(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The `dns` of a configuration, handed back in the result as it came."""

    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class PreviousIp(msgspec.Struct, frozen=True, kw_only=True):
    """One of `prevResult.ips`."""

    address: str
    gateway: str = ""
    interface: int | None = None


class PreviousInterface(msgspec.Struct, frozen=True, kw_only=True):
    """One of `prevResult.interfaces`."""

    name: str
    mac: str = ""
    sandbox: str = ""


class PreviousResult(msgspec.Struct, frozen=True, kw_only=True):
    """What an earlier ADD returned, as the runtime hands it back."""

    interfaces: tuple[PreviousInterface, ...] = ()
    ips: tuple[PreviousIp, ...] = ()


class ValidAttachment(msgspec.Struct, frozen=True, kw_only=True, rename={"container_id": "containerID"}):
    """One of `cni.dev/valid-attachments` (section 2, GC)."""

    container_id: str
    ifname: str


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What `runtimeConfig` (capabilities `ips`, `mac`) or `args.cni` asks for (the specification's CONVENTIONS.md)."""

    ips: tuple[str, ...] | None = None
    mac: str | None = None


class RuntimeConfig(Request, frozen=True, kw_only=True):
    """`runtimeConfig`: what the runtime asks for by the capabilities that a configuration says it has."""

    port_mappings: tuple[hostports.Entry, ...] | None = msgspec.field(name="portMappings", default=None)
    bandwidth: bandwidth.Limits | None = None


class Args(msgspec.Struct, frozen=True, kw_only=True):
    """The `args` of a configuration, as far as they follow the conventions."""

    cni: Request | None = None


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of a network configuration that Podwire reads (section 1).

    `attachments` is what the Go library up to 1.2 calls `valid_attachments`. `last` says that no other plugin follows
    in the list, which a plugin is not told; it is Podwire's own key.
    """

    name: str
    cni_version: str = msgspec.field(name="cniVersion", default=_UNSAID_VERSION)
    dns: Dns | None = None
    previous: PreviousResult | None = msgspec.field(name="prevResult", default=None)
    valid_attachments: tuple[ValidAttachment, ...] | None = msgspec.field(
        name="cni.dev/valid-attachments", default=None
    )
    attachments: tuple[ValidAttachment, ...] | None = msgspec.field(name="cni.dev/attachments", default=None)
    runtime: RuntimeConfig | None = msgspec.field(name="runtimeConfig", default=None)
    args: Args | None = None
    ingress_rate: int | None = msgspec.field(name="ingressRate", default=None)
    ingress_burst: int | None = msgspec.field(name="ingressBurst", default=None)
    egress_rate: int | None = msgspec.field(name="egressRate", default=None)
    egress_burst: int | None = msgspec.field(name="egressBurst", default=None)
    last: bool | None = None


class LeastConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that a DEL or STATUS needs. What else is ill-formed its ADD was refused for, and must not stop it."""

    name: str
    cni_version: str | None = msgspec.field(name="cniVersion", default=None)


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What an ADD asks for by name: addresses, at most one of a family, and a MAC; empty for whatever is free. And
    ports of the node, and limits."""

    addresses: tuple[Address, ...] = ()
    mac: str = ""
    port_mappings: tuple[PortMapping, ...] = ()
    bandwidth: Bandwidth = Bandwidth()


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A CNI call that is well formed. `issued_ns` is CLOCK_BOOTTIME in nanoseconds, when the executable started."""

    command: str
    config: NetworkConfig
    container_id: str
    ifname: str
    netns: str
    pod: PodRef = PodRef()
    wanted: Wanted = Wanted()
    issued_ns: int

    @property
    def key(self) -> AttachmentKey:
        """The attachment that the call is about."""
        return AttachmentKey(self.config.name, self.container_id, self.ifname)


# --- in ---------------------------------------------------------------------------------------------------------


def parse(*, command: str, container_id: str, netns: str, ifname: str, args: str, stdin: bytes, issued_ns: int) -> Call:
    """The call that the runtime makes. Raises a CniError of code 1, 2, 4, 6 or 7 that names what is wrong."""
    if command not in COMMANDS:
        raise InvalidEnvironment(f"CNI_COMMAND is {command!r}, expected one of {', '.join(COMMANDS)} or VERSION")
    if command in ("ADD", "CHECK", "DEL"):
        _check_environment(container_id, ifname, netns if command != "DEL" else None)
    config = _parse_config(command, stdin)
    if _order(config.cni_version) < _order(COMMANDS[command]):
        raise IncompatibleVersion(
            f"{command} needs cniVersion {COMMANDS[command]} or later, the configuration says {config.cni_version!r}"
        )
    call = Call(
        command=command, config=config, container_id=container_id, ifname=ifname, netns=netns, issued_ns=issued_ns
    )
    if command != "ADD":  # what ADD refuses must not stop the DEL that follows
        return call
    if config.previous is not None:
        raise UnsupportedField("prevResult is given, expected none: Podwire makes the interface, so it comes first")
    pairs = _parse_args(args)
    return msgspec.structs.replace(call, pod=_pod(pairs), wanted=_wanted(config, pairs))


def version_of(stdin: bytes) -> str:
    """The cniVersion for an error's JSON, from a configuration that may be anything at all."""
    try:
        plain = msgspec.json.decode(stdin)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return VERSIONS[-1]
    version = plain.get("cniVersion") if isinstance(plain, dict) else None
    return version if version in VERSIONS else VERSIONS[-1]


def _check_environment(container_id: str, ifname: str, netns: str | None) -> None:
    """All that is wrong with the CNI_ variables in one error (section 2, "Parameters")."""
    wrong = []
    if not _NAME.match(container_id):
        wrong.append(f"CNI_CONTAINERID is {container_id!r}, expected [A-Za-z0-9][A-Za-z0-9_.-]*")
    if not 1 <= len(ifname.encode()) <= 15 or ifname in (".", "..") or _IFNAME_FORBIDDEN.search(ifname.encode()):
        wrong.append(f"CNI_IFNAME is {ifname!r}, expected 1 to 15 bytes without '/', ':', '%' or white space")
    if netns == "":
        wrong.append("CNI_NETNS is missing, expected the path of a network namespace")
    if wrong:
        raise InvalidEnvironment("; ".join(wrong))


def _parse_config(command: str, stdin: bytes) -> NetworkConfig:
    try:
        if command in ("DEL", "STATUS"):
            least = msgspec.json.decode(stdin, type=LeastConfig)
            config = NetworkConfig(name=least.name, cni_version=least.cni_version or _UNSAID_VERSION)
        else:
            config = msgspec.convert(_without_nulls(msgspec.json.decode(stdin)), type=NetworkConfig)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"network configuration: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UndecodableConfig(f"standard input is not a network configuration in JSON: {error}") from error
    if config.cni_version not in VERSIONS:
        raise IncompatibleVersion(
            f"cniVersion is {config.cni_version!r}, expected one of {', '.join(VERSIONS)}",
        )
    if not _NAME.match(config.name):
        raise InvalidConfig(f"name is {config.name!r}, expected [A-Za-z0-9][A-Za-z0-9_.-]*")
    return config


def _without_nulls(plain: Any) -> Any:
    """Decoded JSON in which no key has the value null; elements of arrays stay."""
    if isinstance(plain, dict):
        return {key: _without_nulls(value) for key, value in plain.items() if value is not None}
    return [_without_nulls(each) for each in plain] if isinstance(plain, list) else plain


def _parse_args(args: str) -> dict[str, str]:
    """CNI_ARGS: `K=V;K=V`. Keys that Podwire does not know are an error unless IgnoreUnknown says otherwise."""
    pairs: dict[str, str] = {}
    for item in filter(None, args.split(";")):
        key, equals, value = item.partition("=")
        if not equals:
            raise InvalidEnvironment(f"CNI_ARGS holds {item!r}, expected KEY=VALUE pairs separated by ';'")
        pairs[key] = value
    tolerant = pairs.pop("IgnoreUnknown", "").lower() in ("1", "true")
    unknown = sorted(pairs.keys() - _K8S_ARGS)
    if unknown and not tolerant:
        raise InvalidEnvironment(
            f"CNI_ARGS has unknown keys {', '.join(unknown)}; set IgnoreUnknown=1 to pass them over"
        )
    return pairs


def _pod(pairs: Mapping[str, str]) -> PodRef:
    return PodRef(
        namespace=pairs.get("K8S_POD_NAMESPACE", ""),
        name=pairs.get("K8S_POD_NAME", ""),
        uid=pairs.get("K8S_POD_UID", ""),
    )


def _wanted(config: NetworkConfig, pairs: Mapping[str, str]) -> Wanted:
    """What is asked for: `runtimeConfig` goes before `args.cni`, and that before CNI_ARGS, for each of the two."""
    runtime = config.runtime or RuntimeConfig()
    conventional = (config.args and config.args.cni) or Request()
    by_name = tuple(filter(None, pairs.get("IP", "").split(",")))
    ips = (
        ("runtimeConfig.ips", runtime.ips),
        ("args.cni.ips", conventional.ips),
        ("IP of CNI_ARGS", by_name),
    )
    macs = (
        ("runtimeConfig.mac", runtime.mac),
        ("args.cni.mac", conventional.mac),
        ("MAC of CNI_ARGS", pairs.get("MAC", "")),
    )
    where, chosen = next(((where, values) for where, values in ips if values), ("", ()))
    source, mac = next(((where, value) for where, value in macs if value), ("", ""))
    addresses = tuple(_wanted_address(where, text) for text in chosen)
    if len({address.version for address in addresses}) < len(addresses):
        raise _wish_error(where, f"{', '.join(chosen)}, expected at most one address of a family")
    own = bandwidth.Limits(
        ingress_rate=config.ingress_rate,
        ingress_burst=config.ingress_burst,
        egress_rate=config.egress_rate,
        egress_burst=config.egress_burst,
    )
    return Wanted(
        addresses=addresses,
        mac=_wanted_mac(source, mac) if mac else "",
        port_mappings=hostports.parse(runtime.port_mappings or ()),
        bandwidth=bandwidth.parse(own, runtime.bandwidth),
    )


def _wanted_address(where: str, text: str) -> Address:
    """An address, with or without a prefix length: that of the block counts."""
    try:
        return ipaddress.ip_interface(text).ip
    except ValueError as error:
        raise _wish_error(where, f"{text!r}, expected an address such as 10.244.1.7") from error


def _wanted_mac(where: str, text: str) -> str:
    """A unicast MAC, in lower case with colons."""
    if not _MAC.fullmatch(text) or int(text[:2], 16) & 1 or not int(text.replace(":", ""), 16):
        raise _wish_error(where, f"{text!r}, expected a unicast MAC such as 0a:58:0a:f4:01:07")
    return text.lower()


def _wish_error(where: str, what: str) -> CniError:
    """The configuration's fault, or that of the environment."""
    kind = InvalidEnvironment if where.endswith("CNI_ARGS") else InvalidConfig
    return kind(f"{where} asks for {what}")


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


# --- out --------------------------------------------------------------------------------------------------------


def result(attachment: Attachment, gateways: Mapping[Network, Address], config: NetworkConfig) -> bytes:
    """The success of an ADD (section 5, "Result types"), in the shape of the configuration's version.

    `gateways` maps a block to the address that pods in it use as their gateway.
    """
    version = config.cni_version
    old, newest = _order(version) < (1, 0, 0), _order(version) >= (1, 1, 0)
    mtu = {"mtu": attachment.mtu} if newest else {}
    ips: list[dict[str, Any]] = []
    routes = []
    for interface in attachment.addresses:
        gateway = str(gateways[interface.network])
        family = {"version": str(interface.version)} if old else {}
        ips.append({**family, "interface": 1, "address": str(interface), "gateway": gateway})
        routes.append({"dst": DEFAULT_ROUTE[interface.version], "gw": gateway})
    plain: dict[str, Any] = {
        "cniVersion": version,
        "interfaces": [
            {"name": attachment.host_ifname, "mac": host_mac(attachment.host_ifname), **mtu},
            {"name": attachment.key.ifname, "mac": attachment.mac, **mtu, "sandbox": attachment.netns},
        ],
        "ips": ips,
        "routes": routes,
    }
    if config.dns and config.dns != Dns():
        plain["dns"] = msgspec.to_builtins(config.dns)
    return msgspec.json.encode(plain) + b"\n"


def error(failure: BaseException, version: str) -> bytes:
    """The failure as CNI's error JSON (section 5, "Error"), one line."""
    plain = {"cniVersion": version, "code": code_of(failure), "msg": str(failure) or type(failure).__name__}
    details = failure.details if isinstance(failure, CniError) else ""
    if details:
        plain["details"] = details
    return msgspec.json.encode(plain) + b"\n"
