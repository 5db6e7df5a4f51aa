"""How etcd is reached: the `etcd:` section of a daemon's configuration file."""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec


class EtcdOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Endpoints are `host:port`, `http://host:port` or `https://host:port`; an IPv6 host stands in brackets.

    `ca`, `cert` and `key` are paths of PEM files. With any of them an endpoint without a scheme means https. `cert` and
    `key` (the client's) go together. `user` and `password` are refused until they are supported. Raises ValueError for
    what does not fit (podwire.config reports it as a ConfigError, with the file and the field).
    """

    endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)
    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password: str = ""

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("endpoints: at least one is needed, such as http://127.0.0.1:2379")
        if self.user or self.password:
            raise ValueError("user and password are not supported yet: leave them out, or use client certificates")
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
