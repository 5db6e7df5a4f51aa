"""What a request shows of us: an Authorization header and a TLS context, of the files as they are now.

Everything rotates. The kubelet writes a new token every hour or so and a new certificate now and then; a plugin's token
ends. So the files are looked at (stat) before every request and read when they have changed; a plugin runs when what it
gave has ended or was refused. A file that is just being replaced, or a plugin that fails, raises
CredentialsUnavailable; a TLS context that was made before is not replaced by one that cannot be made.

Keys that come as data go to OpenSSL through a memory file: its Python interface takes paths only, and a key that is not
on a disk should stay off it.
"""

from __future__ import annotations

import asyncio
import base64
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import msgspec

from podwire.kube import plugin
from podwire.kube.access import Access, Pem
from podwire.kube.errors import CredentialsUnavailable
from podwire.kube.plugin import Issued

_Stat: TypeAlias = tuple[int, int, int] | None


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What one request shows. `serial` tells what was refused from what has replaced it since."""

    headers: dict[str, str]
    context: ssl.SSLContext
    serial: int


class Credentials:
    """The credentials of one access; for any number of tasks of one loop. `now` is the wall clock."""

    def __init__(
        self,
        access: Access,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._access = access
        self._now = now
        self._environ = environ
        self._asking = asyncio.Lock()
        self._issued: Issued | None = None
        self._token: tuple[_Stat, str] = (None, "")
        self._context: tuple[object, ssl.SSLContext] | None = None
        self._serial = 0

    async def show(self) -> Shown:
        """What the next request shows. Raises CredentialsUnavailable naming what cannot be had."""
        issued = await self._plugin() if self._access.user.plugin else None
        headers = self._headers(issued)
        return Shown(headers=headers, context=self._tls(issued), serial=self._serial)

    def refused(self, shown: Shown) -> bool:
        """The server answered 401. Whether asking again may help: there is something newer, or something to renew."""
        if shown.serial != self._serial:
            return True
        self._token = (None, "")
        self._issued = None
        self._serial += 1
        return bool(self._access.user.plugin or self._access.user.token_file)

    async def _plugin(self) -> Issued:
        asked = self._access.user.plugin
        assert asked is not None
        async with self._asking:  # all kinds are followed at once; one of them asks
            if self._issued is None or not self._issued.valid(self._now()):
                self._issued = await plugin.run(asked, self._environ)
                self._serial += 1
            return self._issued

    def _headers(self, issued: Issued | None) -> dict[str, str]:
        user = self._access.user
        if user.username:
            pair = base64.b64encode(f"{user.username}:{user.password}".encode()).decode()
            return {"Authorization": f"Basic {pair}"}
        token = issued.token if issued else self._from_file(user.token_file) if user.token_file else user.token
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _from_file(self, path: str) -> str:
        stat = _stat(path)
        before, token = self._token
        if stat is not None and stat == before:
            return token
        try:
            token = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise CredentialsUnavailable(f"{path}: the token cannot be read: {error}") from error
        if not token or any(letter.isspace() or not letter.isprintable() for letter in token):
            raise CredentialsUnavailable(f"{path}: {'more than one word' if token else 'empty'}, expected a token")
        self._token = (stat, token)
        self._serial += 1
        return token

    def _tls(self, issued: Issued | None) -> ssl.SSLContext:
        own = (self._access.user.certificate, self._access.user.key)
        if issued is not None and issued.certificate:
            own = (Pem(data=issued.certificate.encode()), Pem(data=issued.key.encode()))
        made_of = (own, tuple(_stat(pem.path) for pem in (self._access.ca, *own) if pem.path))
        if self._context is None or self._context[0] != made_of:
            try:
                context = tls_context(self._access, *own)
            except CredentialsUnavailable:
                if self._context is None or issued is not None:
                    raise
                return self._context[1]  # a file is just being replaced
            self._context = (made_of, context)
        return self._context[1]


def tls_context(access: Access, certificate: Pem, key: Pem) -> ssl.SSLContext:
    """TLS as a client, with this certificate if there is one. Raises CredentialsUnavailable naming the file."""
    context = ssl.create_default_context() if not access.ca else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if access.ca:
        with _path(access.ca) as path:
            _tried(lambda: context.load_verify_locations(cafile=path), f"{_called(access.ca)}: the CA")
    if access.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate:
        with ExitStack() as stack:
            paths = [stack.enter_context(_path(pem)) for pem in (certificate, key)]
            what = f"{_called(certificate)}, {_called(key)}: the client's certificate and key"
            _tried(lambda: context.load_cert_chain(paths[0], paths[1], password=_no_password), what)
    return context


def _tried(load: Callable[[], object], what: str) -> None:
    try:
        load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = (getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)).replace("_", " ")
        raise CredentialsUnavailable(f"{what} cannot be used: {reason.lower()}") from error


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # else OpenSSL asks on the terminal


def _called(pem: Pem) -> str:
    return "given as data" if pem.data else pem.path


@contextmanager
def _path(pem: Pem) -> Iterator[str]:
    if not pem.data:
        yield pem.path
        return
    number = os.memfd_create("podwire-pem", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(number), "wb") as file:
            file.write(pem.data)
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


def _stat(path: str) -> _Stat:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
