"""What `podwire status` says of the node's proxy, whatever state it is in; the numbers are those of its own metrics."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kube_proxy_lite.metrics import PolicyObserver
from podwire.cli.proxy import ask_proxy


def metrics(generations: int, failures: int = 0) -> bytes:
    """What a proxy serves that has brought policies to the kernel so often."""
    registry = CollectorRegistry()
    observer = PolicyObserver(registry)
    for _ in range(generations):
        observer.synced(0.1, False, 1, 0.1)
    for _ in range(failures):
        observer.failed("no reason")
    return generate_latest(registry)


@contextmanager
def serving(pages: dict[str, tuple[int, bytes]]) -> Iterator[str]:
    """A server on loopback with these pages; its address and port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = pages.get(self.path, (404, b"no such page"))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def healthz(code: int, reason: str = "") -> dict[str, tuple[int, bytes]]:
    body = {"lastUpdated": "2026-01-01T00:00:00+00:00", "nodeEligible": True, "reason": reason}
    return {"/healthz": (code, json.dumps(body).encode())}


CASES: dict[str, tuple[bytes, dict[str, tuple[int, bytes]], bool, str]] = {
    "all is well": (metrics(3), healthz(200), True, "policy generation 3 is in effect"),
    "a change waits": (
        metrics(3, 2),
        healthz(503, "a change has been waiting for 100 s"),
        False,
        "in effect, and a later change may not be; 2 runs have failed",
    ),
    "nothing was read yet": (metrics(0), healthz(503, "not yet"), False, "policies are not in effect"),
    "a proxy that counts nothing": (b"", healthz(200), True, "policies are not in effect"),
    "a health page that is somebody else's": (metrics(2), {"/healthz": (200, b"[]")}, False, "generation 2"),
}


@pytest.mark.parametrize(("numbers", "health", "healthy", "words"), CASES.values(), ids=CASES.keys())
def test_a_proxy_that_answers(numbers: bytes, health: dict[str, tuple[int, bytes]], healthy: bool, words: str) -> None:
    with serving({"/metrics": (200, numbers), "/proxyMode": (200, b"nftables"), **health}) as where:
        state = ask_proxy(where, where)
    assert (state.answers, state.mode, state.healthy) == (True, "nftables", healthy)
    assert words in state.policies
    assert state.healthy or state.problem


def test_no_proxy() -> None:
    with serving({}) as where:
        pass
    state = ask_proxy(where, where)
    assert (state.answers, state.generation) == (False, None)
    assert "no change of a policy comes into effect" in state.policies
    assert where in state.problem
