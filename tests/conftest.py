"""What holds for every test: a tier that this machine cannot run is skipped by name, and a run leaves nothing behind.

**Tiers** are the folders of `tests/`, one per privilege and dependency. TIERS says what each needs; the report's header
says which run and what the others lack, and each skipped test says it again.

**Leftovers** are found by comparing the machine before the first test with the machine after the last: named network
namespaces, links, nft tables, mounts, files of Podwire under /run, and processes started by this run, which carry its
mark (RUN_MARK) in their environment as their children do. What is left fails the run as an error in the teardown of the
last test, with the name of the test during which it was first seen; a fixture of a wider scope may have made it there
and should have removed it later.

Other labs and other test runs may live on the same machine. A namespace or a lab's folder in which a process without
our mark lives is someone else's; while another run of these tests holds its lock, what cannot be told apart is a
warning.
The cost: three folder listings a test, and a few milliseconds at both ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

pytest_plugins = ("tests.reliability",)

# No example has a deadline, and none is found slow to draw: a machine that stalls for a second is no counterexample.
# To make a counterexample small may take five minutes, so a suite only says which it found; `make test` draws the same
# each time, so that two runs of one commit say the same, `make test-all` explores. A test run by itself does shrink.
patient = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], report_multiple_bugs=False, print_blob=True
)
unshrunk = [phase for phase in hypothesis.Phase if phase not in (hypothesis.Phase.shrink, hypothesis.Phase.explain)]
hypothesis.settings.register_profile("patient", patient)
hypothesis.settings.register_profile("repeatable", patient, derandomize=True, phases=unshrunk)
hypothesis.settings.register_profile("exploring", patient, phases=unshrunk)
hypothesis.settings.load_profile("patient")

# --- tiers ------------------------------------------------------------------------------------------------------

CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21  # linux/capability.h
DOCKER_SOCKET = "/var/run/docker.sock"
# One of each kind of thing that the wire is made of, in a namespace that ends with the command.
KERNEL_PROBE = """set -e
ip link add probe-bridge type bridge
ip link add probe-veth type veth peer probe-peer
ip link add probe-vxlan type vxlan id 1 dstport 4789
nft add table bridge probe"""


def lacking_programs(*names: str) -> str:
    """Those of `names` that are not installed, as a reason; empty when all are there."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    absent = [name for name in names if shutil.which(name, path=path) is None]
    return f"needs {', '.join(absent)}" if absent else ""


def lacking_namespaces() -> str:
    """Why this process cannot make network namespaces and what goes into them; empty when it can."""
    effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    held = int(effective.split()[1], 16)
    for name, bit in (("CAP_NET_ADMIN", CAP_NET_ADMIN), ("CAP_SYS_ADMIN", CAP_SYS_ADMIN)):
        if not held >> bit & 1:
            return f"needs root with {name}"
    if absent := lacking_programs("unshare", "ip", "nft", "etcd", "ping"):
        return absent
    probe = subprocess.run(["unshare", "--net", "sh", "-c", KERNEL_PROBE], capture_output=True, text=True, check=False)
    return f"needs a kernel that can: {probe.stderr.strip().splitlines()[-1]}" if probe.returncode else ""


def lacking_docker() -> str:
    """Why kind cannot run here; empty when it can."""
    if absent := lacking_programs("docker", "kind", "kubectl"):
        return absent
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(DOCKER_SOCKET)
        except OSError as error:
            return f"needs a Docker engine: {DOCKER_SOCKET}: {error.strerror}"
    return ""


def lacking_kernel() -> str:
    """Why no other kernel can be booted here; empty when one can."""
    booted = next((TESTS.parent / "build" / "vm" / "boot").glob("vmlinuz-*"), None)
    starter = Path(sys.executable).parent / "vng"
    return (
        "" if booted and starter.exists() else "needs Debian's kernel and virtme-ng (deploy/dev/vm-kernel fetches them)"
    )


TESTS = Path(__file__).parent
TIERS: dict[str, Callable[[], str]] = {
    "unit": lambda: "",
    "golden": lambda: "",
    "etcd": lambda: lacking_programs("etcd"),
    "netns": lacking_namespaces,
    "runtime": lambda: lacking_namespaces() or lacking_programs("containerd", "ctr", "runc", "busybox"),
    "vm": lambda: lacking_programs("qemu-system-x86_64") or lacking_kernel(),
    "kind": lacking_docker,
}


@functools.cache
def lacking(tier: str) -> str:
    """Why the tier cannot run on this machine, in one line; empty when it can."""
    return TIERS[tier]()


def tier_of(path: Path) -> str:
    """The tier of a test file; empty outside of the tiers' folders."""
    first = path.relative_to(TESTS).parts[0] if path.is_relative_to(TESTS) else ""
    return first if first in TIERS else ""


def pytest_configure() -> None:
    """A run in a shell's background begins with SIGINT ignored, and so would what the tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """One line a tier: runs, lacks something, or was not asked for."""
    chosen = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    lines = []
    for tier in TIERS:
        folder = TESTS / tier
        if not any(folder.is_relative_to(path) or path.is_relative_to(folder) for path in chosen):
            says = "not in this run" + (f" ({lacking(tier)})" if lacking(tier) else "")
        elif next(folder.rglob("test_*.py"), None) is None:
            says = "has no tests yet"
        elif reason := lacking(tier):
            says = f"SKIPPED: {reason}"
        else:
            says = "runs"
        lines.append(f"tier {tier:8} {says}")
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of tiers that cannot run here."""
    for item in items:
        if (tier := tier_of(item.path)) and (reason := lacking(tier)):
            item.add_marker(pytest.mark.skip(reason=f"{tier}: {reason}"))


# --- leftovers --------------------------------------------------------------------------------------------------

RUN_MARK = "PODWIRE_TEST_RUN"
LAB_MARK = b"PODWIRE_LAB="
NETNS = Path("/run/netns")
LABS = Path("/run/podwire-lab")
PATIENCE = 60.0  # seconds in which what is on its way out may go
BRIEFLY = 5.0  # the same while another run is under way, whose things are there for as long as it likes


class Process:
    """What is known of a process from the outside: its command, its environment, and its network namespace."""

    def __init__(self, pid: int) -> None:
        proc = Path(f"/proc/{pid}")
        self.pid = pid
        self.dead = proc.joinpath("stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        self.command = proc.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        self.environment = proc.joinpath("environ").read_bytes().split(b"\0")
        self.netns = proc.joinpath("ns/net").stat().st_ino

    @property
    def lab(self) -> str:
        """The lab that it belongs to; empty when it belongs to none."""
        return next((v.removeprefix(LAB_MARK).decode() for v in self.environment if v.startswith(LAB_MARK)), "")


def processes() -> list[Process]:
    """All processes that live and that we may look at."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                found.append(Process(int(entry)))
    return [process for process in found if not process.dead]


def names_in(folder: Path) -> set[str]:
    """The names in a folder; none when there is no such folder."""
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def look_quickly() -> set[str]:
    """What a folder listing shows of the machine, as lines of text: `namespace …`, `link …`, `file …`."""
    seen = {f"namespace {name}" for name in names_in(NETNS)} | {
        f"link {name}" for name in names_in(Path("/sys/class/net"))
    }
    for name in names_in(Path("/run")):
        if name.startswith("podwire"):
            seen |= {f"file /run/{name}"} | {f"file /run/{name}/{inner}" for inner in inside(Path("/run") / name)}
    return seen


def inside(path: Path) -> set[str]:
    """The names in a folder; none when it is a file."""
    return names_in(path) if path.is_dir() else set()


def look(mark: bytes) -> set[str]:
    """All that can be left: what `look_quickly` sees, nft tables, mounts, and the processes that carry `mark`."""
    seen = look_quickly()
    if os.geteuid() == 0 and not lacking_programs("nft"):
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False).stdout
        seen |= {f"nft {line}" for line in tables.splitlines()}
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    seen |= {f"mount {point}" for point in mounts if not point.startswith(f"{NETNS}")}
    return seen | {f"process {p.pid} ({p.command})" for p in processes() if mark in p.environment}


def someone_elses(mark: bytes) -> Callable[[str], bool]:
    """Tells whether a line of `look` belongs to a lab or a namespace in which processes without our mark live."""
    others = [process for process in processes() if mark not in process.environment]
    labs = {process.lab for process in others} - {""}
    inodes = {process.netns for process in others}

    def is_theirs(line: str) -> bool:
        kind, _, name = line.partition(" ")
        if kind == "namespace":
            with contextlib.suppress(FileNotFoundError):
                return (NETNS / name).stat().st_ino in inodes or any(name.startswith(f"pw.{lab}.") for lab in labs)
        return kind == "file" and bool(labs) and (Path(name) == LABS or any(Path(name).name == lab for lab in labs))

    return is_theirs


class Guard:
    """The machine as it was before the first test, and when each new thing was first seen."""

    def __init__(self) -> None:
        self.run = uuid.uuid4().hex
        os.environ[RUN_MARK] = self.run
        self.mark = f"{RUN_MARK}={self.run}".encode()
        self.lock = os.open("/run", os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self.lock, fcntl.LOCK_SH)
        self.before = look(self.mark)
        self.first_seen: dict[str, str] = {}

    def note(self, test: str) -> None:
        """Remembers what is new after a test."""
        for line in look_quickly() - self.before:
            self.first_seen.setdefault(line, test)

    def left(self, patience: float) -> list[str]:
        """What was not there before and does not go away by itself within so many seconds, one line each."""
        deadline = time.monotonic() + patience
        while new := look(self.mark) - self.before:
            is_theirs = someone_elses(self.mark)
            new = {line for line in new if not is_theirs(line)}
            if not new or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return [f"{line}{self._since(line)}" for line in sorted(new)]

    def _since(self, line: str) -> str:
        return f" (first seen after {self.first_seen[line]})" if line in self.first_seen else ""

    def alone(self) -> bool:
        """True when no other run of these tests is under way; none begins then until the lock is closed."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


GUARD = pytest.StashKey[Guard]()


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(pytestconfig: pytest.Config) -> Iterator[None]:
    """Fails the run when it leaves something behind. Autouse and here, so it is torn down after every other fixture."""
    guard = pytestconfig.stash[GUARD] = Guard()
    yield
    alone = guard.alone()  # before the look: a run that ends after it has left nothing that is ours
    left = guard.left(PATIENCE if alone else BRIEFLY)
    os.close(guard.lock)
    if not left:
        return
    text = "the tests left behind:\n" + "\n".join(f"  {line}" for line in left)
    ours = [line for line in left if line.startswith("process")]
    if alone or ours:
        pytest.fail(text, pytrace=False)
    warnings.warn(f"{text}\n(or another run of these tests did, which is under way)", stacklevel=1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Notes what is new once a test and its fixtures are done."""
    yield
    if guard := item.config.stash.get(GUARD, None):
        guard.note(item.nodeid)
