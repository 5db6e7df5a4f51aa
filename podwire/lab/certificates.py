"""Certificates for a lab's etcd: an authority of the lab's own, one certificate a member, one a node.

    etcd/pki/  ca.pem ca.key  etcd1.pem etcd1.key …                        the authority, and the members' own
    nodes/node1/etc/podwire/etcd/  ca.pem node.pem node.key                what a node has, its key its own

A member's names its address, and is for both ends of a connection: members are each other's clients. A node's common
name is the node's, so that it is also its user, should somebody switch etcd's users on (docs/etcd.md). Made by openssl
in 20 ms each, when the lab is; nobody needs them for longer than that lab.
"""

from __future__ import annotations

from pathlib import Path

from podwire.lab.state import LabState, NodeState
from podwire.lab.topology import run

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_DAYS = ("-days", "365")


def folder(state: LabState) -> Path:
    """Where the authority and the members' certificates are."""
    return state.files.etcd / "pki"


def node_folder(state: LabState, node: NodeState) -> Path:
    """Where a node's are, on the machine and in every namespace."""
    return state.files.node_path(node.name, "/etc/podwire") / "etcd"


def make(state: LabState) -> None:
    """Makes the authority and the members' certificates. Raises PodwireError."""
    own = folder(state)
    own.mkdir(mode=0o700, parents=True)
    authority = ("-keyout", str(own / "ca.key"), "-out", str(own / "ca.pem"), "-subj", f"/CN=etcd of lab {state.name}")
    run(["openssl", "req", "-x509", *_KEY, *_DAYS, *authority])
    for member in state.etcd:
        _sign(state, own / member.name, member.name, ("subjectAltName=IP:" + member.address, "serverAuth,clientAuth"))


def give(state: LabState, node: NodeState) -> None:
    """Gives a node a certificate of its own. Raises PodwireError."""
    own = node_folder(state, node)
    own.mkdir(mode=0o700, parents=True)
    (own / "ca.pem").write_bytes((folder(state) / "ca.pem").read_bytes())
    _sign(state, own / "node", node.name, ("", "clientAuth"))


def client(own: Path) -> dict[str, str]:
    """The paths of a node's files, by their keys in the daemon's `etcd:` section."""
    return {"ca": str(own / "ca.pem"), "cert": str(own / "node.pem"), "key": str(own / "node.key")}


def member_options(state: LabState, name: str) -> tuple[str, ...]:
    """The options of etcd for a member: its certificate towards clients and members, and theirs are asked for."""
    own = folder(state)
    cert, key, ca = str(own / f"{name}.pem"), str(own / f"{name}.key"), str(own / "ca.pem")
    return (
        *("--cert-file", cert, "--key-file", key, "--trusted-ca-file", ca, "--client-cert-auth"),
        *("--peer-cert-file", cert, "--peer-key-file", key, "--peer-trusted-ca-file", ca, "--peer-client-cert-auth"),
    )


def _sign(state: LabState, path: Path, name: str, extensions: tuple[str, str]) -> None:
    """`path` without its ending: .key and .pem are made. `extensions`: a line or nothing, and what it is for."""
    authority, (names, usage) = folder(state), extensions
    request, wanted = path.with_suffix(".csr"), path.with_suffix(".ext")
    wanted.write_text(f"{names}\nextendedKeyUsage={usage}\n")
    run(["openssl", "req", *_KEY, "-keyout", str(path) + ".key", "-out", str(request), "-subj", f"/CN={name}"])
    signer = ("-CA", str(authority / "ca.pem"), "-CAkey", str(authority / "ca.key"), "-CAcreateserial")
    made = ("-extfile", str(wanted), "-out", f"{path}.pem")
    run(["openssl", "x509", "-req", "-in", str(request), *signer, *_DAYS, *made])
    request.unlink()
    wanted.unlink()
