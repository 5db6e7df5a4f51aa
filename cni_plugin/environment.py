"""The variables that a runtime sets, checked against the CNI specification (§ Section 2, "Parameters").

Everything that is missing or wrong is named in one error (code 4), so that whoever wires up a runtime mends it once.
Values are bytes, as the kernel hands them over; they must be UTF-8, because they travel as text.
"""

from cni_plugin.errors import CniError

SUPPORTED_VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
COMMANDS = (b"ADD", b"DEL", b"CHECK", b"GC", b"STATUS", b"VERSION")

# What the specification requires. Its Go library demands CNI_PATH everywhere; the specification does for GC alone.
REQUIRED = {
    b"ADD": (b"CNI_CONTAINERID", b"CNI_NETNS", b"CNI_IFNAME"),
    b"CHECK": (b"CNI_CONTAINERID", b"CNI_NETNS", b"CNI_IFNAME"),
    b"DEL": (b"CNI_CONTAINERID", b"CNI_IFNAME"),
    b"GC": (b"CNI_PATH",),
    b"STATUS": (),
}

IFNAMSIZ = 16  # with the terminating zero: linux/if.h

_ALNUM = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
# The kernel takes the byte 0xa0 for a space as well (lib/ctype.c), within any letter of UTF-8; and it completes a name
# with % to another one.
_NOT_IN_IFNAME = b"/:% \t\n\r\v\f\xa0"


class Environment:
    """A runtime's request without its standard input: bytes of UTF-8, empty where the runtime set nothing."""

    __slots__ = ("args", "command", "container_id", "ifname", "netns", "path")

    def __init__(
        self,
        command: bytes,
        container_id: bytes = b"",
        netns: bytes = b"",
        ifname: bytes = b"",
        args: bytes = b"",
        path: bytes = b"",
    ) -> None:
        self.command = command
        self.container_id = container_id
        self.netns = netns
        self.ifname = ifname
        self.args = args
        self.path = path


def read_environment(variables: "dict[bytes, bytes]") -> Environment:
    """The request in a process environment whose CNI_COMMAND is one of REQUIRED. Raises CniError (code 4)."""
    command = variables.get(b"CNI_COMMAND", b"")
    required = REQUIRED.get(command)
    if required is None:
        raise CniError(
            4,
            f"unknown CNI_COMMAND {_shown(command)}",
            f"the commands are {', '.join(known.decode() for known in COMMANDS)}",
        )
    environment = Environment(
        command,
        container_id=variables.get(b"CNI_CONTAINERID", b""),
        netns=variables.get(b"CNI_NETNS", b""),
        ifname=variables.get(b"CNI_IFNAME", b""),
        args=variables.get(b"CNI_ARGS", b""),
        path=variables.get(b"CNI_PATH", b""),
    )
    missing = [name.decode() for name in required if not variables.get(name)]
    wrong = _wrong(environment)
    if missing or wrong:
        told = [f"{' and '.join(missing)} must be set for {command.decode()}"] if missing else []
        raise CniError(4, "invalid environment variables", "; ".join(told + wrong))
    return environment


def _wrong(environment: Environment) -> "list[str]":
    """What is ill-formed, one sentence each. What is empty is missing or optional, not wrong."""
    found = []
    if environment.container_id and not well_formed_container_id(environment.container_id):
        found.append(
            f"CNI_CONTAINERID {_shown(environment.container_id)} must begin with a letter or digit and hold only "
            "letters, digits, '_', '.' and '-'"
        )
    if environment.ifname and not well_formed_ifname(environment.ifname):
        found.append(
            f"CNI_IFNAME {_shown(environment.ifname)} must be 1 to {IFNAMSIZ - 1} bytes of UTF-8, not '.' or '..', "
            "without '/', ':', '%' and what the kernel takes for whitespace"
        )
    if environment.netns and environment.command in (b"ADD", b"CHECK") and environment.netns[:1] != b"/":
        found.append(f"CNI_NETNS {_shown(environment.netns)} must be an absolute path")
    for name, value in (
        ("CNI_NETNS", environment.netns),
        ("CNI_ARGS", environment.args),
        ("CNI_PATH", environment.path),
    ):
        if not _is_utf8(value):
            found.append(f"{name} {_shown(value)} must be UTF-8")
    return found


def well_formed_container_id(value: bytes) -> bool:
    """`^[A-Za-z0-9][A-Za-z0-9_.-]*$`, as in the specification."""
    return value[:1].isalnum() and not value.translate(None, _ALNUM + b"_.-")


def well_formed_ifname(value: bytes) -> bool:
    """What the kernel takes as a link's name (`dev_valid_name`), in UTF-8."""
    return (
        0 < len(value) < IFNAMSIZ
        and value not in (b".", b"..")
        and value.translate(None, _NOT_IN_IFNAME) == value
        and _is_utf8(value)
    )


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shown(value: bytes) -> str:
    """For a message: quoted, escaped where it is not UTF-8, and cut where it is long."""
    return repr(value[:200].decode("utf-8", "backslashreplace"))
