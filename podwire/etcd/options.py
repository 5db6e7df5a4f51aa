"""How etcd is reached: the `etcd:` section of a daemon's configuration file."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from podwire.config import ConfigError


class EtcdOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Endpoints are `host:port`, `http://host:port` or `https://host:port`; an IPv6 host stands in brackets.

    `ca`, `cert` and `key` are paths of PEM files. With any of them an endpoint without a scheme means https. `cert` and
    `key` (the client's) go together. `user` goes with `password`, or better with `password_file`, whose first line is
    the password. Files are read again when a connection, or a login, has to be made again. Raises ValueError for what
    does not fit (podwire.config reports it as a ConfigError, with the file and the field).
    """

    endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)
    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password: str = ""
    password_file: str = ""

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("endpoints: at least one is needed, such as http://127.0.0.1:2379")
        if self.password and self.password_file:
            raise ValueError("password and passwordFile are both given: one of them is enough")
        if bool(self.user) != bool(self.password or self.password_file):
            raise ValueError("user goes together with password or passwordFile")
        if bool(self.cert) != bool(self.key):
            raise ValueError("cert and key go together: the client's certificate and its private key")
        for endpoint in self.endpoints:
            _, secure = parse_endpoint(endpoint, self.tls)
            if self.tls and not secure:
                raise ValueError(f"endpoints: {endpoint!r} is plain http, but ca, cert or key is given: use https")

    @property
    def tls(self) -> bool:
        """True when any certificate is configured."""
        return bool(self.ca or self.cert)

    def read_password(self) -> str:
        """The password, from its file if it is in one. Raises ConfigError when the file cannot be read."""
        if not self.password_file:
            return self.password
        try:
            return Path(self.password_file).read_text(encoding="utf-8").splitlines()[0]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"etcd.passwordFile: {self.password_file}: cannot be read: {error}") from error
        except IndexError:
            raise ConfigError(f"etcd.passwordFile: {self.password_file}: is empty, expected the password") from None


def parse_endpoint(text: str, tls: bool = False) -> tuple[str, bool]:
    """(`host:port`, whether it is TLS). Raises ValueError naming the endpoint."""
    scheme, _, rest = text.rpartition("://")
    scheme = scheme or ("https" if tls else "http")
    try:
        parts = urlsplit(f"//{rest}")
        whole = parts.hostname and parts.port and not (parts.path.strip("/") or parts.query or parts.username)
    except ValueError:
        whole = False
    if scheme not in ("http", "https") or not whole:
        raise ValueError(f"endpoints: {text!r} is not an endpoint: write http://host:port or https://host:port")
    return parts.netloc, scheme == "https"
