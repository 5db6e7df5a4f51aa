"""Exec plugins: real programs, asked as kubectl asks them, and what becomes of those that do not answer well."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from podwire.kube import plugin
from podwire.kube.access import Access, ExecPlugin, User
from podwire.kube.credentials import Credentials
from podwire.kube.errors import CredentialsUnavailable
from tests.unit.kube_fixtures import Reply, Script, client, eventually, run, status

MARK = "PODWIRE_TEST_PLUGIN"
V1 = "client.authentication.k8s.io/v1"


def program(folder: Path, script: str, name: str = "plugin") -> str:
    """A shell script, as an executable."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def answer(**what: Any) -> str:
    return json.dumps({"apiVersion": V1, "kind": "ExecCredential", "status": what})


def asked(command: str, **options: Any) -> ExecPlugin:
    return ExecPlugin(api_version=V1, command=command, **options)


def test_a_plugin_is_asked_and_its_token_kept_until_it_ends(tmp_path: Path) -> None:
    async def story() -> None:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        until = (now + timedelta(minutes=5)).isoformat()
        count = tmp_path / "count"
        command = program(
            tmp_path, f"echo run >> {count}\nprintf '%s' '{answer(token='TOKEN', expirationTimestamp=until)}'"
        )
        times = [now]
        access = Access(servers=("http://x",), origin="t", user=User(plugin=asked(command)))
        credentials = Credentials(access, now=lambda: times[-1])
        shown = await asyncio.gather(*(credentials.show() for _ in range(5)))
        assert {one.headers["Authorization"] for one in shown} == {"Bearer TOKEN"}
        assert count.read_text() == "run\n"
        times.append(now + timedelta(minutes=6))
        await credentials.show()
        assert count.read_text() == "run\nrun\n"

    run(story)


def test_a_refused_token_makes_the_plugin_run_again(tmp_path: Path) -> None:
    async def story() -> None:
        count = tmp_path / "count"
        command = program(
            tmp_path, f'echo x >> {count}; n=$(wc -l < {count})\nprintf \'{answer(token="t%s")}\' "$n" | tr -d " "'
        )
        script = Script(Reply(b"{}"), Reply.of(status(401), 401), Reply(b"{}"))
        async with script.serving() as url, client(url, user=User(plugin=asked(command))) as one:
            await one.get("/", {})
            await one.get("/", {})
        assert script.authorizations == ["Bearer t1", "Bearer t1", "Bearer t2"]

    run(story)


def test_what_a_plugin_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        seen = tmp_path / "seen"
        command = program(
            tmp_path, f"{{ printf '%s\\n' \"$KUBERNETES_EXEC_INFO\" \"$MINE\" \"$*\"; cat; }} > {seen}\nprintf '%s' "
            f"'{answer(token='x')}'",
        )  # fmt: skip
        info = msgspec.Raw(b'{"server":"https://a:6443"}')
        one = asked(command, args=("get", "a b"), env=(("MINE", "yes"),), cluster_info=info)
        await plugin.run(one, {"PATH": os.environ["PATH"]})
        told, mine, args = seen.read_text().splitlines()
        assert json.loads(told) == {
            "kind": "ExecCredential", "apiVersion": V1,
            "spec": {"interactive": False, "cluster": {"server": "https://a:6443"}},
        }  # fmt: skip
        assert (mine, args) == ("yes", "get a b")

    run(story)


FAILURES: dict[str, tuple[str, str]] = {
    "it fails": ("echo no session: log in first >&2; exit 3", "exit code 3: no session: log in first"),
    "it says nothing": ("exit 0", "its output is no ExecCredential"),
    "it says something else": ("echo hello", "its output is no ExecCredential"),
    "another version": (
        f"printf '%s' '{json.dumps({'kind': 'ExecCredential', 'apiVersion': 'client.authentication.k8s.io/v1beta1'})}'",
        "its output is ExecCredential, client.authentication.k8s.io/v1beta1; expected",
    ),
    "no credential in it": (f"printf '%s' '{answer()}'", "neither a token nor a certificate"),
    "half a certificate": (f"printf '%s' '{answer(clientKeyData='x')}'", "go together"),
    "an end that is no time": (f"printf '%s' '{answer(token='x', expirationTimestamp='soon')}'", "no ExecCredential"),
    "it hangs": ("sleep 1000", "no answer within 0.3 s"),
    "it leaves a child that hangs on its output": ("sleep 1000 &\nexit 0", "no answer within 0.3 s"),
    "it never stops talking": ("yes", "no answer within 0.3 s"),
}


@pytest.mark.parametrize(("script", "words"), FAILURES.values(), ids=FAILURES)
def test_a_plugin_that_fails_is_quoted_and_leaves_nothing(script: str, words: str, tmp_path: Path) -> None:
    async def story() -> None:
        command = program(tmp_path, script)
        marked = {**os.environ, MARK: str(tmp_path)}
        with pytest.raises(CredentialsUnavailable, match=words) as caught:
            await plugin.run(asked(command), marked, within=0.3 if "0.3" in words else 60)
        assert str(caught.value).startswith(command)
        await eventually(lambda: not alive(f"{MARK}={tmp_path}".encode()))

    run(story)


def alive(mark: bytes) -> bool:
    """Whether a process is there that carries `mark` in its environment; one that only waits to be collected has none.

    Whether the program had the time to say who it is does not matter.
    """
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environment.read_bytes().split(b"\0"):
                return True
    return False


def test_a_program_that_is_not_there_comes_with_its_hint() -> None:
    async def story() -> None:
        with pytest.raises(CredentialsUnavailable, match=r"no-such-plugin: cannot be run: .*; get it from us"):
            await plugin.run(asked("no-such-plugin", install_hint="get it\nfrom us"), os.environ)

    run(story)
