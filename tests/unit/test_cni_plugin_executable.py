"""The executable as installed, started as a runtime starts it: what it prints, how it exits, what it queues."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from podwire.install import find_interpreter, install
from podwire.v1 import cni_pb2, cni_pb2_grpc

VARIABLES = {
    "CNI_CONTAINERID": "c0ffee",
    "CNI_NETNS": "/run/netns/a",
    "CNI_IFNAME": "eth0",
    "CNI_ARGS": "K8S_POD_NAME=web",
    "CNI_PATH": "/opt/cni/bin",
}
CONFIGURATION = b'{"cniVersion":"1.0.0","name":"podwire","type":"podwire"}'
RESULT = b'{"cniVersion":"1.0.0"}\n'
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
PATIENCE = 90.0  # also each call's deadline, where a test does not set a shorter one
COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS")


class Daemon(cni_pb2_grpc.CNIServicer):
    """Keeps the requests; answers as it is told, or not at all while `hung` is set."""

    def __init__(self) -> None:
        self.requests: list[cni_pb2.CallRequest] = []
        self.response = cni_pb2.CallResponse(api=1, stdout=RESULT)
        self.hung = False
        self.called = threading.Event()
        self.released = threading.Event()

    def Call(self, request: cni_pb2.CallRequest, context: grpc.ServicerContext) -> cni_pb2.CallResponse:  # noqa: N802
        self.requests.append(request)
        self.called.set()
        if self.hung:
            context.add_callback(self.released.set)
            self.released.wait(PATIENCE)
        return self.response


class Node:
    """An executable with short deadlines, and where its daemon and its queue would be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "run" / "ipamd.sock"
        self.queue = folder / "lib" / "queue"
        self.socket.parent.mkdir()
        self.executable = self.installed(dict.fromkeys(COMMANDS, PATIENCE))

    def installed(self, deadlines: Mapping[str, float]) -> Path:
        self.executable = install(self.folder / "cni" / "bin", None, self.socket, self.queue, deadlines=deadlines)
        return self.executable

    def run(
        self,
        command: str,
        stdin: bytes = CONFIGURATION,
        variables: Mapping[str, str] = VARIABLES,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        environment = {"CNI_COMMAND": command, **variables}
        return subprocess.run(
            [self.executable], input=stdin, env=environment, capture_output=True, cwd=cwd, timeout=PATIENCE, check=False
        )

    def queued(self) -> list[Path]:
        return sorted(self.queue.iterdir()) if self.queue.exists() else []

    @contextlib.contextmanager
    def daemon(self) -> Iterator[Daemon]:
        daemon = Daemon()
        pool = futures.ThreadPoolExecutor(24)
        server = grpc.server(pool, options=[("grpc.max_receive_message_length", 64 << 20)])
        cni_pb2_grpc.add_CNIServicer_to_server(daemon, server)  # type: ignore[no-untyped-call]
        server.add_insecure_port(f"unix:{self.socket}")
        server.start()
        try:
            yield daemon
        finally:
            server.stop(0).wait(PATIENCE)
            pool.shutdown()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def error_of(done: subprocess.CompletedProcess[bytes]) -> dict[str, object]:
    """The CNI error that was printed: one line, exit code 1, nothing else anywhere."""
    assert done.returncode == 1, done
    assert done.stderr == b""
    assert done.stdout.endswith(b"\n")
    assert done.stdout.count(b"\n") == 1
    error = json.loads(done.stdout)
    assert sorted(error) == ["cniVersion", "code", "details", "msg"]
    return dict(error)


# --- with a daemon -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_the_daemon_is_asked_and_its_answer_printed(command: str, node: Node) -> None:
    with node.daemon() as daemon:
        done = node.run(command)
    assert (done.returncode, done.stdout, done.stderr) == (0, RESULT, b"")
    (request,) = daemon.requests
    assert request.issued_at > 0
    request.ClearField("issued_at")
    assert request == cni_pb2.CallRequest(
        api_min=1,
        api_max=1,
        command=command,
        container_id="c0ffee",
        netns="/run/netns/a",
        ifname="eth0",
        args="K8S_POD_NAME=web",
        path="/opt/cni/bin",
        stdin=CONFIGURATION,
    )


STDINS = {
    "empty": b"",
    "not JSON, not text": bytes(range(256)),
    "a megabyte": b"x" * (1 << 20),
    "the longest": b"x" * (16 << 20),
}


@pytest.mark.parametrize("case", STDINS)
def test_standard_input_arrives_as_it_is(case: str, node: Node) -> None:
    with node.daemon() as daemon:
        assert node.run("ADD", STDINS[case]).returncode == 0
    assert daemon.requests[0].stdin == STDINS[case]


ANSWERS: dict[str, tuple[cni_pb2.CallResponse, int]] = {
    "a CNI error": (cni_pb2.CallResponse(api=1, stdout=b'{"code":7}', exit_code=1), 1),
    "nothing": (cni_pb2.CallResponse(api=1), 0),
    "another exit code": (cni_pb2.CallResponse(api=1, exit_code=3), 3),
    "an exit code that would wrap to success": (cni_pb2.CallResponse(api=1, exit_code=256), 1),
    "not text": (cni_pb2.CallResponse(api=1, stdout=bytes(range(256))), 0),
    "three megabytes": (cni_pb2.CallResponse(api=1, stdout=b"x" * (3 << 20)), 0),
    "a refusal in an API to come": (cni_pb2.CallResponse(api=9, stdout=b'{"code":11}', exit_code=1), 1),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_are_printed_as_they_are(case: str, node: Node) -> None:
    response, exit_code = ANSWERS[case]
    with node.daemon() as daemon:
        daemon.response = response
        done = node.run("ADD")
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, response.stdout, b"")


def test_a_success_in_an_api_to_come_is_not_believed(node: Node) -> None:
    with node.daemon() as daemon:
        daemon.response = cni_pb2.CallResponse(api=9, stdout=RESULT)
        assert error_of(node.run("ADD"))["code"] == 11
        assert node.run("DEL").returncode == 0
    assert len(node.queued()) == 1


def test_twenty_at_once(node: Node) -> None:
    with node.daemon() as daemon, futures.ThreadPoolExecutor(20) as pool:
        names = [f"container-{number}" for number in range(20)]
        done = list(pool.map(lambda name: node.run("ADD", variables={**VARIABLES, "CNI_CONTAINERID": name}), names))
    assert {process.returncode for process in done} == {0}
    assert sorted(request.container_id for request in daemon.requests) == sorted(names)


def test_a_hostile_environment_changes_nothing(node: Node, tmp_path: Path) -> None:
    """Runtimes pass on what they were started with; the folder is whatever it happens to be."""
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("socket", "_socket", "json", "os", "site", "sitecustomize", "select", "cni_plugin", "encodings"):
        for folder in (trap, node.executable.parent):
            (folder / f"{name}.py").write_text("print('trapped')\nraise SystemExit(9)\n")
    hostile = {
        "PYTHONPATH": str(trap),
        "PYTHONHOME": str(trap),
        "PYTHONSTARTUP": str(trap / "json.py"),
        "PYTHONVERBOSE": "1",
        "PYTHONWARNINGS": "error",
        "PYTHONINSPECT": "1",
        "LC_ALL": "xx_XX.ISO-8859-15",
    }
    with node.daemon():
        done = node.run("ADD", variables={**VARIABLES, **hostile}, cwd=trap)
    assert (done.returncode, done.stdout, done.stderr) == (0, RESULT, b"")
    assert error_of(node.run("ADD", variables={**VARIABLES, **hostile}, cwd=trap))["code"] == 11


def test_an_answered_call_imports_nothing_but_itself_and_what_is_compiled_in(node: Node) -> None:
    """`json`, `re` or `socket` would double what the executable adds to the bare interpreter."""

    def imported(*arguments: str | Path) -> set[str]:
        command = [find_interpreter().path, "-IS", "-X", "importtime", *arguments]
        environment = {"CNI_COMMAND": "ADD", **VARIABLES}
        done = subprocess.run(command, input=b"{}", env=environment, capture_output=True, timeout=PATIENCE, check=True)
        return {line.rpartition("|")[2].strip() for line in done.stderr.decode().splitlines()}

    with node.daemon():
        added = imported(node.executable) - imported("-c", "pass")
    assert {name for name in added if not name.startswith("cni_plugin")} <= {"_socket", "select", "errno"}


# --- without a daemon --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)])
def test_a_daemon_that_is_down(command: str, code: int, node: Node) -> None:
    error = error_of(node.run(command))
    assert (error["code"], error["cniVersion"]) == (code, "1.0.0")
    assert str(node.socket) in str(error["details"])
    assert node.queued() == []


def test_del_without_a_daemon_is_queued_and_succeeds(node: Node) -> None:
    done = node.run("DEL")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    (queued,) = node.queued()
    assert queued.suffix == ".del"
    assert (queued.stat().st_mode & 0o777, node.queue.stat().st_mode & 0o777) == (0o600, 0o700)
    request = cni_pb2.CallRequest.FromString(queued.read_bytes())
    assert int(queued.name.split("-")[0]) == request.issued_at > 0
    request.ClearField("issued_at")
    assert request == cni_pb2.CallRequest(
        api_min=1,
        api_max=1,
        command="DEL",
        container_id="c0ffee",
        netns="/run/netns/a",
        ifname="eth0",
        args="K8S_POD_NAME=web",
        path="/opt/cni/bin",
        stdin=CONFIGURATION,
        boot_id=BOOT_ID,
    )


def test_the_queue_keeps_the_order_of_deletions(node: Node) -> None:
    for number in range(3):
        node.run("DEL", variables={**VARIABLES, "CNI_CONTAINERID": f"c{number}"})
    requests = [cni_pb2.CallRequest.FromString(path.read_bytes()) for path in node.queued()]
    assert [request.container_id for request in requests] == ["c0", "c1", "c2"]


def test_a_del_that_was_sent_but_not_answered_is_queued(node: Node) -> None:
    node.installed({"DEL": 0.5})
    with node.daemon() as daemon:
        daemon.hung = True
        while not daemon.requests:  # a machine that stalls may leave a call no time to ask
            assert node.run("DEL").returncode == 0
    queued = node.queued()[-1]
    request = cni_pb2.CallRequest.FromString(queued.read_bytes())
    assert request.boot_id == BOOT_ID
    request.ClearField("boot_id")
    assert request == daemon.requests[0]  # its issued_at, too: the daemon can tell that it is one and the same


def test_a_daemon_that_hangs(node: Node) -> None:
    node.installed({"ADD": 0.5})
    with node.daemon() as daemon:
        daemon.hung = True
        assert error_of(node.run("ADD"))["code"] == 11


def test_a_runtime_that_gives_up_ends_it_without_a_word(node: Node) -> None:
    with node.daemon() as daemon:
        daemon.hung = True
        environment = {"CNI_COMMAND": "ADD", **VARIABLES}
        pipe = subprocess.PIPE
        with subprocess.Popen([node.executable], stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as process:
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None  # `communicate` would write to it
            assert daemon.called.wait(PATIENCE)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=PATIENCE) == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_a_del_of_nothing_that_could_be_found_is_not_queued(node: Node) -> None:
    error = error_of(node.run("DEL", variables={"CNI_CONTAINERID": "../..", "CNI_IFNAME": ""}))
    assert error["code"] == 4
    assert "CNI_IFNAME must be set" in str(error["details"])
    assert "CNI_CONTAINERID '../..'" in str(error["details"])
    assert node.queued() == []


def test_a_del_that_cannot_be_queued_fails(node: Node) -> None:
    node.queue.parent.write_text("a file where the folder should be")
    error = error_of(node.run("DEL"))
    assert error["code"] == 11
    assert "Not a directory" in str(error["details"])
    assert "cannot connect" in str(error["details"])


def test_a_del_that_does_not_fit_the_disk_fails_and_leaves_nothing(node: Node) -> None:
    """A limit of the process on the size of files stands for a disk that is full."""
    done = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -f 0; exec "$0"', node.executable],
        input=CONFIGURATION,
        env={"CNI_COMMAND": "DEL", **VARIABLES},
        capture_output=True,
        check=False,
    )
    error = error_of(done)
    assert error["code"] == 11
    assert "File too large" in str(error["details"])
    assert node.queued() == []


# --- without anyone ----------------------------------------------------------------------------------------------


def test_version_needs_no_daemon_and_reads_nothing(node: Node) -> None:
    reading, writing = os.pipe()  # never written to, never closed before the answer is there
    try:
        done = subprocess.run(
            [node.executable],
            stdin=reading,
            env={"CNI_COMMAND": "VERSION"},
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout) == {
        "cniVersion": "1.1.0",
        "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    }


def test_without_a_command_it_says_what_it_is(node: Node) -> None:
    done = node.run("")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"Podwire" in done.stderr


REFUSED: dict[str, tuple[str, dict[str, str], bytes, int, str]] = {
    "an unknown command": ("UPDATE", {}, CONFIGURATION, 4, "1.0.0"),
    "missing variables": ("ADD", {"CNI_IFNAME": "", "CNI_NETNS": ""}, CONFIGURATION, 4, "1.0.0"),
    "the version of the configuration": ("UPDATE", {}, b'{"cniVersion":"0.3.1"}', 4, "0.3.1"),
    "a version that nobody knows": ("UPDATE", {}, b'{"cniVersion":"7"}', 4, "1.1.0"),
    "a version that is no text": ("UPDATE", {}, b'{"cniVersion":[1]}', 4, "1.1.0"),
    "a configuration that is no object": ("UPDATE", {}, b"[]", 4, "1.1.0"),
    "no configuration": ("UPDATE", {}, b"", 4, "1.1.0"),
    "a configuration that is not text": ("UPDATE", {}, b"\xff\xfe", 4, "1.1.0"),
    "a configuration without bottom": ("UPDATE", {}, b"[" * 100_000, 4, "1.1.0"),
    "too much input": ("ADD", {}, b"x" * ((16 << 20) + 1), 6, "1.1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, node: Node) -> None:
    command, changes, stdin, code, version = REFUSED[case]
    error = error_of(node.run(command, stdin, {**VARIABLES, **changes}))
    assert (error["code"], error["cniVersion"]) == (code, version)


def test_input_that_never_ends(node: Node) -> None:
    node.installed({"ADD": 0.5})
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [node.executable],
            stdin=reading,
            env={"CNI_COMMAND": "ADD", **VARIABLES},
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    finally:
        os.close(reading)
        os.close(writing)
    assert error_of(done)["code"] == 5


def test_what_nobody_has_foreseen_is_an_error_too(node: Node) -> None:
    node.installed({})  # an executable that knows no deadline
    error = error_of(node.run("ADD"))
    assert (error["code"], error["details"]) == (999, "KeyError: 'ADD'")


def test_an_executable_whose_package_is_gone_says_so(node: Node) -> None:
    for module in (node.folder / "cni" / "podwire").glob("*/cni_plugin/main.py"):
        module.unlink()
    for module in (node.folder / "cni" / "podwire").glob("*/cni_plugin/__pycache__/main.*"):
        module.unlink()
    assert error_of(node.run("ADD"))["code"] == 5


# The shell closes the descriptor; a socket that took its number would get what is meant for the runtime.
CLOSED: dict[str, tuple[str, str, int, bytes]] = {
    "ADD without standard output": ("ADD", ">&-", 1, b""),
    "ADD with nothing open": ("ADD", "<&- >&- 2>&-", 1, b""),
    "ADD without standard error": ("ADD", "2>&-", 0, RESULT),
    "ADD without standard input": ("ADD", "<&-", 0, RESULT),
    "ADD into a full device": ("ADD", ">/dev/full", 1, b""),
}


@pytest.mark.parametrize("case", CLOSED)
def test_closed_descriptors(case: str, node: Node) -> None:
    command, redirection, exit_code, stdout = CLOSED[case]
    with node.daemon() as daemon:
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "$0" {redirection}', node.executable],
            input=CONFIGURATION,
            env={"CNI_COMMAND": command, **VARIABLES},
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, stdout, b"")
    assert len(daemon.requests) == 1


def test_a_runtime_that_has_stopped_listening(node: Node) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with node.daemon() as daemon:
        daemon.response = cni_pb2.CallResponse(api=1, stdout=bytes(1 << 20))
        try:
            done = subprocess.run(
                [node.executable],
                input=CONFIGURATION,
                env={"CNI_COMMAND": "ADD", **VARIABLES},
                stdout=writing,
                stderr=subprocess.PIPE,
                timeout=PATIENCE,
                check=False,
            )
        finally:
            os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


# --- daemons that are none ---------------------------------------------------------------------------------------

STRANGERS: dict[str, Callable[[socket.socket], object]] = {
    "one that hangs up": lambda connection: connection.close(),
    "one that hangs up when asked": lambda connection: connection.recv(1 << 16),
    "a web server": lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "one that is leaving": lambda connection: connection.sendall(
        bytes.fromhex("0000000400000000000000080700000000000000000000000000")
    ),
    "one whose answer is no CallResponse": lambda connection: connection.sendall(
        bytes.fromhex("00000004000000000000000101040000000188000006000000000001000000000108")
    ),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_strangers_at_the_socket(case: str, node: Node) -> None:
    """To the runtime they are all a daemon that is down."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node.socket))
        listener.listen()

        def receive() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection, contextlib.suppress(ConnectionError):
                    STRANGERS[case](connection)

        stranger = threading.Thread(target=receive)
        stranger.start()
        try:
            assert error_of(node.run("ADD"))["code"] == 11
            done = node.run("DEL")
        finally:
            stranger.join(PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert len(node.queued()) == 1
