"""Credentials from a program: exec plugins of kubeconfigs, as cloud providers and SSO tools install them.

    KUBERNETES_EXEC_INFO ──▶ program ──▶ ExecCredential on its standard output ──▶ token or certificate, and until when

A daemon has no terminal: the program is told so (`interactive: false`) and gets no standard input. It runs in a process
group of its own, which is ended as a whole after `RUN_S`; what it prints is bounded. What it writes on standard error
is the best there is to say about a failure, and is quoted.

Source: client.authentication.k8s.io/v1 and v1beta1.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime

import msgspec

from podwire.kube.access import ExecPlugin
from podwire.kube.errors import CredentialsUnavailable

RUN_S = 60.0
_MOST = 1 << 20  # bytes of output
_QUOTED = 300  # characters of standard error


class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """What a plugin gave: a token, a certificate with its key, or both; `until` None: until it is refused."""

    token: str = ""
    certificate: str = ""
    key: str = ""
    until: datetime | None = None

    def valid(self, now: datetime) -> bool:
        """Whether it may still be shown."""
        return self.until is None or now < self.until


class _Status(msgspec.Struct, frozen=True, rename="camel"):
    token: str | None = None
    client_certificate_data: str | None = None
    client_key_data: str | None = None
    expiration_timestamp: datetime | None = None


class _Credential(msgspec.Struct, frozen=True, rename="camel"):
    api_version: str = ""
    kind: str = ""
    status: _Status | None = None


def question(plugin: ExecPlugin) -> str:
    """The ExecCredential with which the plugin is asked."""
    spec: dict[str, object] = {"interactive": False}
    if plugin.cluster_info is not None:
        spec["cluster"] = plugin.cluster_info
    asked = {"kind": "ExecCredential", "apiVersion": plugin.api_version, "spec": spec}
    return msgspec.json.encode(asked).decode()


def understood(plugin: ExecPlugin, output: bytes) -> Issued:
    """What the plugin answered. Raises CredentialsUnavailable saying what is wrong with it."""
    try:
        answer = msgspec.json.decode(output, type=_Credential)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CredentialsUnavailable(f"{plugin.command}: its output is no ExecCredential: {error}") from error
    if (answer.kind, answer.api_version) != ("ExecCredential", plugin.api_version):
        said = f"{answer.kind or 'no kind'}, {answer.api_version or 'no apiVersion'}"
        raise CredentialsUnavailable(
            f"{plugin.command}: its output is {said}; expected ExecCredential, {plugin.api_version}"
        )
    status = answer.status or _Status()
    certificate, key = status.client_certificate_data or "", status.client_key_data or ""
    if bool(certificate) != bool(key):
        raise CredentialsUnavailable(f"{plugin.command}: clientCertificateData and clientKeyData go together")
    if not status.token and not certificate:
        raise CredentialsUnavailable(f"{plugin.command}: status has neither a token nor a certificate")
    until = status.expiration_timestamp
    if until is not None and until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return Issued(token=status.token or "", certificate=certificate, key=key, until=until)


class _Conversation(asyncio.SubprocessProtocol):
    """Collects what a program prints. `ended` is done when it has exited and nobody holds its output any more."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.printed = {1: bytearray(), 2: bytearray()}
        self.exited: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """What is beyond the bound is dropped, so that the program does not block."""
        kept = self.printed[fd]
        kept += data[: max(0, _MOST - len(kept))]

    def process_exited(self) -> None:
        """It has ended; what it started may still hold its output."""
        self.exited.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (pipes say nothing else)
        """All is over."""
        if not self.ended.done():
            self.ended.set_result(None)


async def run(plugin: ExecPlugin, environ: Mapping[str, str], within: float = RUN_S) -> Issued:
    """Asks the plugin. Raises CredentialsUnavailable."""
    environment = {**environ, **dict(plugin.env), "KUBERNETES_EXEC_INFO": question(plugin)}
    try:
        process, talk = await asyncio.get_running_loop().subprocess_exec(
            _Conversation,
            plugin.command,
            *plugin.args,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = f"; {' '.join(plugin.install_hint.split())}" if plugin.install_hint else ""
        raise CredentialsUnavailable(f"{plugin.command}: cannot be run: {reason}{hint}") from error
    try:
        async with asyncio.timeout(within):
            await talk.ended
    except TimeoutError as error:
        raise CredentialsUnavailable(f"{plugin.command}: no answer within {within:g} s") from error
    finally:
        with suppress(ProcessLookupError):  # whatever it started and left
            os.killpg(process.get_pid(), signal.SIGKILL)
        process.close()
        await talk.exited
    code = process.get_returncode()
    if code:
        words = " ".join(talk.printed[2].decode("utf-8", "replace").split())[-_QUOTED:]
        raise CredentialsUnavailable(f"{plugin.command}: exit code {code}{': ' if words else ''}{words}")
    return understood(plugin, bytes(talk.printed[1]))
