"""Kubeconfig files: the format that kubectl, the kubelet and every cluster's tools write.

    file, file, … ──▶ decoded strictly by type ──▶ merged ──▶ one context ──▶ Access

Of several files (KUBECONFIG is a list) the first that names a cluster, user or context defines it, and the first
current-context counts. Relative paths are relative to the file that they stand in. What is in the format and not
supported here (a proxy, impersonation, the old auth-provider, a plugin that must have a terminal) is an error that
says so, since passing over it would reach another place, or as somebody else. Errors name file, entry and field;
never the value of a secret.

Source: kubeconfig (v1), client.authentication.k8s.io/v1 and v1beta1 in the Kubernetes reference.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from podwire.config import ConfigError, load
from podwire.kube.access import Access, ExecPlugin, Pem, User, server_url

EXEC_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
_EXEC_EXTENSION = "client.authentication.k8s.io/exec"


class _Extension(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    extension: Any = None


class _Cluster(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    server: str = ""
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""
    extensions: tuple[_Extension, ...] | None = None


class _Variable(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    value: str = ""


class _Exec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    api_version: str = ""
    command: str = ""
    args: tuple[str, ...] | None = None
    env: tuple[_Variable, ...] | None = None
    install_hint: str = ""
    provide_cluster_info: bool = False
    interactive_mode: str = ""


class _User(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    token: str = ""
    token_file: str = msgspec.field(default="", name="tokenFile")
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    username: str = ""
    password: str = ""
    exec: _Exec | None = None
    auth_provider: Any = None
    as_: str = msgspec.field(default="", name="as")
    as_groups: tuple[str, ...] | None = None
    as_uid: str = ""


class _Context(msgspec.Struct, frozen=True, kw_only=True):
    cluster: str = ""
    user: str = ""
    namespace: str = ""


class _NamedCluster(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    cluster: _Cluster = _Cluster()


class _NamedUser(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    user: _User | None = None


class _NamedContext(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    context: _Context = _Context()


class _File(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    kind: str = "Config"
    clusters: tuple[_NamedCluster, ...] | None = None
    users: tuple[_NamedUser, ...] | None = None
    contexts: tuple[_NamedContext, ...] | None = None
    current_context: str = ""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=_Named)


class _Place(msgspec.Struct, Generic[N], frozen=True):
    """An entry and the file that it stands in."""

    path: Path
    entry: N

    def wrong(self, what: str, field: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.path}: {what} {self.entry.name!r}: {field}{problem}")

    def file(self, path: str) -> str:
        """A path as it is meant in this file."""
        return str(self.path.parent / path) if path else ""


def read(paths: Sequence[Path], context: str = "") -> Access:
    """The access that a context gives; by default the current one. Files that are missing are passed over if one of
    several is there. Raises ConfigError."""
    present = [path for path in paths if path.exists()] or list(paths)
    files = [(path.absolute(), load(path, _File)) for path in present]
    for path, file in files:
        if file.kind != "Config":
            raise ConfigError(f"{path}: kind is {file.kind!r}, expected Config: this is no kubeconfig")
    names = ", ".join(str(path) for path, _ in files)
    wanted = context or next((file.current_context for _, file in files if file.current_context), "")
    contexts = _merged((path, file.contexts) for path, file in files)
    if not wanted:
        raise ConfigError(f"{names}: current-context is missing; contexts are {_listed(contexts)}")
    if wanted not in contexts:
        raise ConfigError(f"{names}: there is no context {wanted!r}; contexts are {_listed(contexts)}")
    chosen = contexts[wanted]
    clusters = _merged((path, file.clusters) for path, file in files)
    users = _merged((path, file.users) for path, file in files)
    cluster = _referred(chosen, clusters, "cluster", chosen.entry.context.cluster)
    user = _referred(chosen, users, "user", chosen.entry.context.user) if chosen.entry.context.user else None
    return _access(cluster, user, chosen.entry.context.namespace)


def _merged(lists: Iterable[tuple[Path, Sequence[N] | None]]) -> dict[str, _Place[N]]:
    merged: dict[str, _Place[N]] = {}
    for path, entries in lists:
        for entry in entries or ():
            merged.setdefault(entry.name, _Place(path, entry))
    return merged


def _listed(entries: dict[str, Any]) -> str:
    return ", ".join(sorted(entries)) or "none"


def _referred(context: _Place[_NamedContext], entries: dict[str, _Place[N]], field: str, name: str) -> _Place[N]:
    if name not in entries:
        raise context.wrong("context", f"{field} is {name!r}", f"; {field}s are {_listed(entries)}")
    return entries[name]


def _access(cluster: _Place[_NamedCluster], user: _Place[_NamedUser] | None, namespace: str) -> Access:
    said = cluster.entry.cluster
    if said.proxy_url:
        raise cluster.wrong("cluster", "proxy-url", " is not supported: the API must be reached directly")
    try:
        server = server_url(said.server)
    except ValueError as error:
        raise cluster.wrong("cluster", "server: ", str(error)) from error
    ca = _pem(cluster, "cluster", "certificate-authority", said.certificate_authority, said.certificate_authority_data)
    if ca and said.insecure_skip_tls_verify:
        raise cluster.wrong("cluster", "insecure-skip-tls-verify", " is true and there is a certificate-authority")
    access = Access(
        servers=(server,),
        origin=str(cluster.path),
        ca=ca,
        insecure=said.insecure_skip_tls_verify,
        server_name=said.tls_server_name,
        namespace=namespace or "default",
    )
    return access if user is None else msgspec.structs.replace(access, user=_user(user, cluster, server, ca))


def _user(place: _Place[_NamedUser], cluster: _Place[_NamedCluster], server: str, ca: Pem) -> User:
    said = place.entry.user or _User()
    if said.auth_provider is not None:
        raise place.wrong("user", "auth-provider", " is not supported (Kubernetes 1.26 dropped it); write exec")
    if said.as_ or said.as_groups or said.as_uid:
        raise place.wrong("user", "as", " (impersonation) is not supported")
    if bool(said.username) != bool(said.password):
        raise place.wrong("user", "username", " and password go together")
    if said.username and (said.token or said.token_file):
        raise place.wrong("user", "token", " and username are both given: one of them is enough")
    certificate = _pem(place, "user", "client-certificate", said.client_certificate, said.client_certificate_data)
    key = _pem(place, "user", "client-key", said.client_key, said.client_key_data)
    if bool(certificate) != bool(key):
        raise place.wrong("user", "client-certificate", " and client-key go together")
    plugin = None if said.exec is None else _plugin(place, said.exec, cluster, server, ca)
    if plugin is not None and (said.token or said.token_file or said.username):
        raise place.wrong("user", "exec", " and a token or username are both given: one of them is enough")
    return User(
        token=said.token,
        token_file=place.file(said.token_file),
        username=said.username,
        password=said.password,
        certificate=certificate,
        key=key,
        plugin=plugin,
    )


def _pem(place: _Place[Any], what: str, field: str, path: str, data: str) -> Pem:
    if not data:
        return Pem(path=place.file(path))
    try:
        decoded = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise place.wrong(what, f"{field}-data", f" is not base64: {error}") from error
    if b"-----BEGIN" not in decoded:
        raise place.wrong(what, f"{field}-data", " is base64 of something that is not PEM (-----BEGIN …)")
    return Pem(data=decoded)


def _plugin(place: _Place[_NamedUser], said: _Exec, cluster: _Place[_NamedCluster], server: str, ca: Pem) -> ExecPlugin:
    if said.api_version not in EXEC_VERSIONS:
        raise place.wrong(
            "user", f"exec.apiVersion is {said.api_version!r}", f", expected one of {', '.join(EXEC_VERSIONS)}"
        )
    if not said.command:
        raise place.wrong("user", "exec.command", " is missing")
    if said.interactive_mode not in ("", "Never", "IfAvailable"):
        raise place.wrong(
            "user", f"exec.interactiveMode is {said.interactive_mode!r}", ", expected Never or IfAvailable: no terminal"
        )
    return ExecPlugin(
        api_version=said.api_version,
        command=place.file(said.command) if "/" in said.command else said.command,
        args=said.args or (),
        env=tuple((variable.name, variable.value) for variable in said.env or ()),
        install_hint=said.install_hint,
        cluster_info=_cluster_info(cluster.entry.cluster, server, ca) if said.provide_cluster_info else None,
    )


def _cluster_info(said: _Cluster, server: str, ca: Pem) -> msgspec.Raw:
    """`spec.cluster` of what the plugin is told. The CA goes as bytes, wherever it came from."""
    info: dict[str, Any] = {"server": server}
    if said.tls_server_name:
        info["tls-server-name"] = said.tls_server_name
    if said.insecure_skip_tls_verify:
        info["insecure-skip-tls-verify"] = True
    try:
        data = Path(ca.path).read_bytes() if ca.path else ca.data
    except OSError as error:
        raise ConfigError(f"{ca.path}: cannot be read: {error.strerror}") from error
    if data:
        info["certificate-authority-data"] = base64.b64encode(data).decode()
    for one in said.extensions or ():
        if one.name == _EXEC_EXTENSION:
            info["config"] = one.extension
    return msgspec.Raw(msgspec.json.encode(info))
