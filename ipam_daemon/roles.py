"""What a node's daemon must be allowed to do in etcd, and no more. Pure.

etcd grants by key and range of keys, not by value. So a node can be kept from writing another node's record and name,
and the configuration; but any free block may become its own, so that it has to write all keys under blocks/, the key
that makes claims wait, and what is for people only (gone/). What keeps nodes apart there is the daemon: every write is
a transaction on the key's revision. A transaction is refused as a whole when one of its operations is, even in the
branch not taken.
"""

from __future__ import annotations

import shlex

import msgspec

from ipam_daemon.registry import ROOT


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """`permission` is etcd's: read, write, readwrite. `prefix`: on all keys that begin with `key`."""

    permission: str
    key: str
    prefix: bool = False


def node_grants(node: str, root: str = ROOT) -> tuple[Grant, ...]:
    """The permissions of the daemon of `node`."""
    return (
        Grant(permission="read", key=root, prefix=True),
        Grant(permission="readwrite", key=f"{root}blocks/", prefix=True),
        Grant(permission="readwrite", key=f"{root}nodes/{node}"),
        Grant(permission="readwrite", key=f"{root}live/{node}"),
        Grant(permission="readwrite", key=f"{root}gone/", prefix=True),
        Grant(permission="readwrite", key=f"{root}restored"),
        Grant(permission="readwrite", key=f"{root}forgotten/{node}"),
    )


def admin_grants(root: str = ROOT) -> tuple[Grant, ...]:
    """The permissions of who may write the configuration, and forget nodes."""
    return (Grant(permission="readwrite", key=root, prefix=True),)


def recipe(node: str, user: str, password_file: str = "", *, admin: bool = False) -> tuple[str, ...]:
    """The etcdctl commands that make role and user. Endpoints and root's login come from ETCDCTL_ variables.

    Without `password_file` the user has no password: it logs in by a client certificate with its name.
    """
    role = f"podwire-{node}"
    grants = admin_grants() if admin else node_grants(node)
    login = f"--interactive=false < {shlex.quote(password_file)}" if password_file else "--no-password"
    return (
        shlex.join(("etcdctl", "role", "add", role)),
        *(
            shlex.join(
                (
                    *("etcdctl", "role", "grant-permission", role),
                    *(("--prefix=true",) if grant.prefix else ()),
                    *(grant.permission, grant.key),
                )
            )
            for grant in grants
        ),
        f"{shlex.join(('etcdctl', 'user', 'add', user))} {login}",
        shlex.join(("etcdctl", "user", "grant-role", user, role)),
    )
