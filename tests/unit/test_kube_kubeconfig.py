"""Kubeconfigs and service accounts: what they come to, and what is said of those that cannot be used."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from podwire.config import ConfigError, load
from podwire.kube import kubeconfig
from podwire.kube.access import Access, ExecPlugin, Pem, User
from podwire.kube.options import KubeOptions, access
from podwire.lab.api.kubeconfig import kubeconfig as lab_kubeconfig

PEM = b"-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"
DATA = base64.b64encode(PEM).decode()
V1 = "client.authentication.k8s.io/v1"


def config(user: Any = None, cluster: Any = None, **top: Any) -> dict[str, Any]:
    """A kubeconfig of one context."""
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "k", "cluster": {"server": "https://api:6443", **(cluster or {})}}],
        "users": [{"name": "u", "user": {} if user is None else user}],
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "shop"}}],
        **top,
    }  # fmt: skip


def written(folder: Path, content: Any, name: str = "config") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


TAKEN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "nothing but a server": ({}, {}, {}),
    "a token": ({"token": "abc"}, {}, {"token": "abc"}),
    "a token file, relative": ({"tokenFile": "keys/token"}, {}, {"token_file": "{folder}/keys/token"}),
    "a token file, absolute": ({"tokenFile": "/t"}, {}, {"token_file": "/t"}),
    "user and password": ({"username": "u", "password": "p"}, {}, {"username": "u", "password": "p"}),
    "a certificate in files": (
        {"client-certificate": "c.pem", "client-key": "k.pem"}, {},
        {"certificate": Pem(path="{folder}/c.pem"), "key": Pem(path="{folder}/k.pem")},
    ),
    "a certificate as data, which goes first": (
        {"client-certificate": "c.pem", "client-certificate-data": DATA, "client-key-data": f"{DATA[:8]}\n{DATA[8:]}"},
        {}, {"certificate": Pem(data=PEM), "key": Pem(data=PEM)},
    ),
    "a plugin by its name": (
        {"exec": {"apiVersion": V1, "command": "login", "args": None, "interactiveMode": "IfAvailable"}}, {},
        {"plugin": ExecPlugin(api_version=V1, command="login")},
    ),
    "a plugin beside the file": (
        {"exec": {"apiVersion": V1, "command": "./login", "args": ["a"], "env": [{"name": "A", "value": "b"}]}}, {},
        {"plugin": ExecPlugin(api_version=V1, command="{folder}/login", args=("a",), env=(("A", "b"),))},
    ),
    "null for a user": (None, {}, {}),  # type: ignore[dict-item]
    "fields to come": ({"token": "x", "future": {"a": 1}}, {"future": 1, "disable-compression": True}, {"token": "x"}),
}  # fmt: skip


@pytest.mark.parametrize(("user", "cluster", "expected"), TAKEN.values(), ids=TAKEN)
def test_taken(user: dict[str, Any], cluster: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    folder = str(tmp_path)

    def placed(value: Any) -> Any:
        if isinstance(value, str):
            return value.format(folder=folder)
        if isinstance(value, Pem):
            return Pem(path=value.path.format(folder=folder), data=value.data)
        if isinstance(value, ExecPlugin):
            return msgspec.structs.replace(value, command=value.command.format(folder=folder))
        return value

    found = kubeconfig.read([written(tmp_path, config(user, cluster))])
    assert found.user == User(**{name: placed(value) for name, value in expected.items()})
    assert (found.servers, found.namespace) == (("https://api:6443",), "shop")


def test_the_cluster_of_a_kubeconfig(tmp_path: Path) -> None:
    cluster = {"server": "https://[fd00::1]:6443/base/", "certificate-authority": "ca.pem", "tls-server-name": "k8s"}
    found = kubeconfig.read([written(tmp_path, json.dumps(config(cluster=cluster)))])
    assert found == Access(
        servers=("https://[fd00::1]:6443/base",), origin=str(tmp_path / "config"), namespace="shop",
        ca=Pem(path=str(tmp_path / "ca.pem")), server_name="k8s",
    )  # fmt: skip


def test_a_plugin_is_told_of_the_cluster_when_it_asks(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(PEM)
    cluster = {
        "certificate-authority": "ca.pem",
        "tls-server-name": "k8s",
        "extensions": [{"name": "client.authentication.k8s.io/exec", "extension": {"audience": "a"}}],
    }
    user = {"exec": {"apiVersion": V1, "command": "x", "provideClusterInfo": True}}
    plugin = kubeconfig.read([written(tmp_path, config(user, cluster))]).user.plugin
    assert plugin is not None
    assert plugin.cluster_info is not None
    assert json.loads(bytes(plugin.cluster_info)) == {
        "server": "https://api:6443", "tls-server-name": "k8s", "certificate-authority-data": DATA,
        "config": {"audience": "a"},
    }  # fmt: skip


REFUSED: dict[str, tuple[Any, str]] = {
    "not YAML": ("a: [", "not YAML"),
    "a list": ([1], "Expected `object`"),
    "another kind of file": ({"kind": "Pod", "metadata": {}}, "kind is 'Pod', expected Config"),
    "no current context": (config(**{"current-context": ""}), "current-context is missing; contexts are c"),
    "a context that is not there": (config(**{"current-context": "x"}), "no context 'x'; contexts are c"),
    "a cluster that is not there": (config(clusters=[]), "context 'c': cluster is 'k'; clusters are none"),
    "a user that is not there": (config(users=[{"name": "v"}]), "context 'c': user is 'u'; users are v"),
    "no server": (config(cluster={"server": ""}), "cluster 'k': server: '' is not the URL of a server"),
    "a server without a scheme": (config(cluster={"server": "api:6443"}), "'api:6443' is not the URL of a server"),
    "a port that is none": (config(cluster={"server": "https://a:99999"}), "is not the URL of a server"),
    "a proxy": (config(cluster={"proxy-url": "http://p"}), "proxy-url is not supported"),
    "a CA that is no base64": (config(cluster={"certificate-authority-data": "%%"}), "data is not base64"),
    "a CA that is no PEM": (config(cluster={"certificate-authority-data": "AAAA"}), "something that is not PEM"),
    "verified and not verified": (
        config(cluster={"certificate-authority": "x", "insecure-skip-tls-verify": True}), "insecure-skip-tls-verify",
    ),
    "a truth that is text": (
        config(cluster={"insecure-skip-tls-verify": "yes"}), r"Expected `bool`, got `str`.*clusters",
    ),
    "a token that is a number": (
        config({"token": 12345}), r"Expected `str`, got `int` - at `\$.users\[0\].user.token`",
    ),
    "a password alone": (config({"password": "p"}), "user 'u': username and password go together"),
    "two ways at once": (config({"username": "a", "password": "p", "token": "t"}), "one of them is enough"),
    "a key alone": (config({"client-key": "k"}), "client-certificate and client-key go together"),
    "the old way of plugins": (config({"auth-provider": {"name": "gcp"}}), "auth-provider is not supported"),
    "as somebody else": (config({"as": "root"}), "impersonation"),
    "a plugin of an old version": (
        config({"exec": {"apiVersion": "client.authentication.k8s.io/v1alpha1", "command": "x"}}),
        "exec.apiVersion is 'client.authentication.k8s.io/v1alpha1', expected one of",
    ),
    "a plugin without a command": (config({"exec": {"apiVersion": V1}}), "exec.command is missing"),
    "a plugin that needs a terminal": (
        config({"exec": {"apiVersion": V1, "command": "x", "interactiveMode": "Always"}}), "no terminal",
    ),
    "a plugin and a token": (config({"token": "t", "exec": {"apiVersion": V1, "command": "x"}}), "one of them"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_with_file_and_field(content: Any, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=words) as caught:
        kubeconfig.read([path])
    assert str(path) in str(caught.value)


def test_a_secret_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        kubeconfig.read([written(tmp_path, config({"username": "a", "password": "S3CRET", "token": "S3CRET"}))])
    assert "S3CRET" not in str(caught.value)


def test_of_several_files_the_first_that_says_something_counts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    first = written(tmp_path / "sub", {"kind": "Config", "users": [{"name": "u", "user": {"tokenFile": "t"}}]})
    second = written(tmp_path, config({"token": "passed over"}), "second")
    found = access(KubeOptions(), environ={"KUBECONFIG": f"{first}:{tmp_path}/missing:{second}"})
    assert found.user == User(token_file=str(tmp_path / "sub" / "t"))
    with pytest.raises(ConfigError, match="missing: cannot be read"):
        access(KubeOptions(kubeconfig=str(tmp_path / "missing")))


def test_a_context_is_chosen_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, config(**{"current-context": ""}))
    assert access(KubeOptions(kubeconfig=str(path), context="c")).namespace == "shop"


def test_the_lab_s_kubeconfig_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, lab_kubeconfig("http://127.0.0.1:1", "podwire-lab"))
    assert access(KubeOptions(kubeconfig=str(path))).servers == ("http://127.0.0.1:1",)


# --- options and pods -------------------------------------------------------------------------------------------


def account(folder: Path) -> Path:
    folder.mkdir()
    for name, text in (("token", "t"), ("ca.crt", "c"), ("namespace", "kube-system\n")):
        (folder / name).write_text(text)
    return folder


def test_in_a_pod_the_service_account_is_used_with_servers_of_the_configuration(tmp_path: Path) -> None:
    folder = account(tmp_path / "sa")
    options = KubeOptions(servers=("https://10.0.0.1:6443/", "https://10.0.0.2:6443"))
    found = access(options, environ={"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, service_account=folder)
    assert found.servers == ("https://10.0.0.1:6443", "https://10.0.0.2:6443")
    assert (found.user, found.namespace) == (User(token_file=str(folder / "token")), "kube-system")
    assert found.ca == Pem(path=str(folder / "ca.crt"))


def test_the_cluster_ip_is_taken_by_who_does_not_make_it_work(tmp_path: Path) -> None:
    folder = account(tmp_path / "sa")
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    with pytest.raises(ConfigError, match=r"servers is empty.*fd00::1 is a ClusterIP, which this program itself makes"):
        access(KubeOptions(), environ=environ, service_account=folder)
    told = access(KubeOptions(), virtual=True, environ=environ, service_account=folder)
    assert told.servers == ("https://[fd00::1]:443",)
    with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_HOST is not set"):
        access(KubeOptions(), virtual=True, environ={}, service_account=folder)


def test_without_anything_it_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give kubeconfig"):
        access(KubeOptions(), environ={}, service_account=tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "words"),
    [("servers: [api]", "servers: 'api' is not the URL"), ("server: x", "unknown field `server`")],
)
def test_options_are_strict(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load(written(tmp_path, text), KubeOptions)
