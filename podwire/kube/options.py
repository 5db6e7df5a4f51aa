"""How the Kubernetes API is reached: the `kubernetes:` section of a program's configuration file, and what it comes to.

    kubeconfig: FILE        ──▶ its current context, or `context`
    nothing                 ──▶ $KUBECONFIG, else the service account of the pod that we are in
    servers: [URL, …]       ──▶ in place of the server that the above name

A pod is told the API's ClusterIP (KUBERNETES_SERVICE_HOST). The program that makes ClusterIPs work must not need one to
start, so it demands `servers`; `podwire-ipamd` may take what it is told.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from podwire.config import ConfigError
from podwire.kube import kubeconfig
from podwire.kube.access import Access, Pem, User, server_url

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class KubeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """`kubeconfig` is a path, or several with colons between. `servers` are URLs such as https://10.0.0.1:6443.

    Raises ValueError for what does not fit (podwire.config reports it as a ConfigError, with the file and the field).
    """

    kubeconfig: str = ""
    context: str = ""
    servers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for server in self.servers:
            try:
                server_url(server)
            except ValueError as error:
                raise ValueError(f"servers: {error}") from error


def access(
    options: KubeOptions,
    *,
    virtual: bool = False,
    environ: Mapping[str, str] = os.environ,
    service_account: Path = SERVICE_ACCOUNT,
) -> Access:
    """What the options come to. `virtual`: the ClusterIP that a pod is told will do. Raises ConfigError."""
    files = options.kubeconfig or environ.get("KUBECONFIG", "")
    if files:
        found = kubeconfig.read([Path(path) for path in files.split(":") if path], options.context)
    elif (service_account / "token").exists():
        found = in_cluster(service_account, () if options.servers else _told(environ, virtual))
    else:
        raise ConfigError(
            f"no credentials for the Kubernetes API: give kubeconfig (or $KUBECONFIG); {service_account} is not there"
        )
    if options.servers:
        found = msgspec.structs.replace(found, servers=tuple(server_url(server) for server in options.servers))
    return found


def in_cluster(folder: Path, servers: tuple[str, ...]) -> Access:
    """The service account whose files the kubelet keeps in `folder`: a token that rotates, the CA, the namespace."""
    ca = folder / "ca.crt"
    namespace = folder / "namespace"
    try:
        own = namespace.read_text(encoding="utf-8").strip() if namespace.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{namespace}: cannot be read: {error}") from error
    return Access(
        servers=servers,
        origin=str(folder),
        ca=Pem(path=str(ca)) if ca.exists() else Pem(),
        user=User(token_file=str(folder / "token")),
        namespace=own or "default",
    )


def _told(environ: Mapping[str, str], virtual: bool) -> tuple[str, ...]:
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not virtual:
        told = f" ({host} is a ClusterIP, which this program itself makes work)" if host else ""
        raise ConfigError(f"servers is empty, expected the API's own addresses such as https://10.0.0.1:6443{told}")
    if not host:
        raise ConfigError("servers is empty, and KUBERNETES_SERVICE_HOST is not set")
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    try:
        return (server_url(url),)
    except ValueError as error:
        raise ConfigError(f"KUBERNETES_SERVICE_HOST, KUBERNETES_SERVICE_PORT: {error}") from error
