"""Where the API is and who we are to it: what a kubeconfig, or a pod's service account, comes to.

Values, read once. What they point at (token files, certificate files, a plugin) is read when it is used, again and
again, because all of it rotates: credentials.py.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec


class Pem(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate or key: the path of a file, or the PEM text itself (which goes first). Neither: there is none."""

    path: str = ""
    data: bytes = b""

    def __bool__(self) -> bool:
        return bool(self.path or self.data)


class ExecPlugin(msgspec.Struct, frozen=True, kw_only=True):
    """A program that gives credentials (client.authentication.k8s.io). `command` is a path, or a name for PATH.

    `cluster_info` is what it is told of the cluster, if it asked for that (`provideClusterInfo`).
    """

    api_version: str
    command: str
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    install_hint: str = ""
    cluster_info: msgspec.Raw | None = None


class User(msgspec.Struct, frozen=True, kw_only=True):
    """Who we are. A token file goes before a token; a certificate is shown besides any of them."""

    token: str = ""
    token_file: str = ""
    username: str = ""
    password: str = ""
    certificate: Pem = Pem()
    key: Pem = Pem()
    plugin: ExecPlugin | None = None


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """`servers` are URLs, asked in turn. `ca` missing: the system's. `server_name` is whom the certificate must name.

    `origin` says for error messages where all this was read.
    """

    servers: tuple[str, ...]
    origin: str
    ca: Pem = Pem()
    insecure: bool = False
    server_name: str = ""
    user: User = User()
    namespace: str = "default"


def server_url(text: str) -> str:
    """The URL of a server without its trailing slash. Raises ValueError saying what would be right."""
    try:
        parts = urlsplit(text)
        whole = parts.hostname and (parts.port or 1) and not (parts.query or parts.fragment or parts.username)
    except ValueError:
        whole = False
    if not whole or parts.scheme not in ("http", "https"):
        raise ValueError(f"{text!r} is not the URL of a server: write https://host:port")
    return text.rstrip("/")
