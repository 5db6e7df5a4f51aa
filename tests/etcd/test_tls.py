"""The session over TLS: certificates that etcd demands, what is said of a wrong one, and how they are replaced."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from ipam_daemon.registry import ROOT
from podwire.etcd import EtcdError, EtcdOptions, EtcdSession, EtcdUnavailable
from podwire.lab.etcd import EtcdServer
from tests.etcd.guarded import Guarded, need

Run = Callable[[Coroutine[Any, Any, Any]], Any]
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """A certificate authority in a folder of its own; what it signs is for 127.0.0.1 and both ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.ca = str(self.folder / "ca.pem")
        self._openssl("req", "-x509", *_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-subj", f"/CN={name}")

    def sign(self, name: str, address: str = "127.0.0.1", days: int = 2) -> tuple[str, str]:
        """The paths of a certificate with this common name, and of its key. Negative days: it has expired."""
        self._openssl("req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        extensions = f"subjectAltName=IP:{address}\nextendedKeyUsage=serverAuth,clientAuth\n"
        (self.folder / "extensions").write_text(extensions)
        signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extensions")
        self._openssl("x509", "-req", "-in", f"{name}.csr", *signer, "-days", str(days), "-out", f"{name}.pem")
        return str(self.folder / f"{name}.pem"), str(self.folder / f"{name}.key")

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)


class Keys:
    """The certificates of these tests."""

    def __init__(self, folder: Path) -> None:
        self.ours, self.theirs = Authority(folder, "ours"), Authority(folder, "theirs")
        self.server = self.ours.sign("server")
        self.node = self.ours.sign("a")
        self.expired = self.ours.sign("expired", days=-1)
        self.elsewhere = self.ours.sign("elsewhere", address="127.0.0.9")
        self.stranger = self.theirs.sign("stranger")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    need("openssl", "etcd")
    return Keys(tmp_path_factory.mktemp("keys"))


def serve(folder: Path, keys: Keys, own: tuple[str, str]) -> EtcdServer:
    """A server with this certificate, which asks for its clients'."""
    cert, key = own
    files = ("--cert-file", cert, "--key-file", key, "--trusted-ca-file", keys.ours.ca)
    return EtcdServer(folder, tls=True, options=(*files, "--client-cert-auth"), dies_with_parent=True)


@pytest.fixture(scope="module")
def secured(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with serve(tmp_path_factory.mktemp("secured"), keys, keys.server) as server:
        yield server


def options(endpoint: str, ca: str, own: tuple[str, str] = ("", "")) -> EtcdOptions:
    return EtcdOptions(endpoints=(endpoint,), ca=ca, cert=own[0], key=own[1])


async def reason(etcd: EtcdSession) -> str:
    """Why there is no connection. Asked again when a handshake took a stalling machine too long to say why."""
    while True:
        with pytest.raises(EtcdUnavailable) as refused:
            await etcd.get("/a")
        if not re.search(r":\d+$", str(refused.value)):  # the endpoint alone
            return str(refused.value)


def test_who_has_a_certificate_is_talked_to(keys: Keys, secured: EtcdServer, run: Run) -> None:
    async def story() -> None:
        async with EtcdSession(options(secured.endpoint, keys.ours.ca, keys.node)) as etcd:
            await etcd.put("/a", b"1")

    run(story())


CLIENTS: dict[str, tuple[Callable[[Keys], tuple[str, tuple[str, str]]], str]] = {
    "another CA": (lambda keys: (keys.theirs.ca, keys.node), r"etcd's certificate is not accepted.*theirs/ca\.pem"),
    "the system's CAs": (lambda keys: ("", keys.node), r"etcd's certificate is not accepted.*ca: system"),
    "no certificate": (lambda keys: (keys.ours.ca, ("", "")), r"handshake fails.*our certificate: none"),
    "an expired certificate": (lambda keys: (keys.ours.ca, keys.expired), r"handshake fails.*expired\.pem.*expired"),
    "a stranger's certificate": (lambda keys: (keys.ours.ca, keys.stranger), r"handshake fails.*stranger\.pem"),
    "a key that is not the certificate's": (
        lambda keys: (keys.ours.ca, (keys.node[0], keys.server[1])),
        r"certificates cannot be used.*mismatch",
    ),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_with_the_wrong_papers_is_told_which(name: str, keys: Keys, secured: EtcdServer, run: Run) -> None:
    chosen, message = CLIENTS[name]

    async def story() -> None:
        async with EtcdSession(options(secured.endpoint, *chosen(keys))) as etcd:
            assert re.search(message, await reason(etcd))
            assert etcd.last_error

    run(story())


SERVERS: dict[str, tuple[Callable[[Keys], tuple[str, str]], str]] = {
    "expired": (lambda keys: keys.expired, "certificate has expired"),
    "for another address": (lambda keys: keys.elsewhere, "not valid for '127.0.0.1'"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_with_the_wrong_papers_is_named(name: str, keys: Keys, tmp_path: Path, run: Run) -> None:
    chosen, message = SERVERS[name]

    async def story(endpoint: str) -> None:
        async with EtcdSession(options(endpoint, keys.ours.ca, keys.node)) as etcd:
            assert re.search(message, await reason(etcd))

    with serve(tmp_path, keys, chosen(keys)) as server:
        run(story(server.endpoint))


def test_certificates_are_replaced_while_a_daemon_runs(keys: Keys, tmp_path: Path, run: Run) -> None:
    """Server, client and CA change at once; the session is not made anew."""
    papers = {name: tmp_path / name for name in ("ca.pem", "own.pem", "own.key")}

    def hold(authority: Authority, own: tuple[str, str]) -> None:
        for path, source in zip(papers.values(), (authority.ca, *own), strict=True):
            shutil.copyfile(source, path)

    async def story(server: EtcdServer) -> None:
        ca, *own = map(str, papers.values())
        async with (
            EtcdSession(options(server.endpoint, ca, (own[0], own[1]))) as etcd,
            aclosing(etcd.watch_prefix("/")) as watch,
        ):
            await anext(watch)
            server.kill()
            hold(keys.theirs, keys.stranger)
            server.start()
            while True:
                try:
                    await etcd.put("/a", b"1")
                    break
                except EtcdUnavailable:
                    await asyncio.sleep(0.02)
            await anext(watch)

    hold(keys.ours, keys.server)
    ca, cert, key = map(str, papers.values())
    files = ("--cert-file", cert, "--key-file", key, "--trusted-ca-file", ca, "--client-cert-auth")
    with EtcdServer(tmp_path, tls=True, options=files, dies_with_parent=True) as server:
        run(story(server))


def test_the_common_name_of_a_certificate_is_a_user(keys: Keys, tmp_path: Path, run: Run) -> None:
    need("etcdctl")

    async def story(endpoint: str) -> None:
        async with EtcdSession(options(endpoint, keys.ours.ca, keys.node)) as etcd:
            await etcd.put(f"{ROOT}nodes/a", b"mine")
            with pytest.raises(EtcdError) as refused:
                await etcd.put(f"{ROOT}nodes/b", b"mine")
            assert refused.value.code == "PERMISSION_DENIED"
        both = EtcdOptions(
            endpoints=(endpoint,), ca=keys.ours.ca, cert=keys.node[0], key=keys.node[1], user="root", password="secret"
        )
        async with EtcdSession(both) as etcd:
            await etcd.put(f"{ROOT}nodes/b", b"a token goes before the certificate")

    with serve(tmp_path, keys, keys.server) as server:
        made = Guarded(server, keys.ours.ca, *keys.node)
        made.enable()
        made.recipe("a")
        run(story(server.endpoint))
