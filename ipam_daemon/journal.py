"""The journal: which attachment has which addresses inside this node's blocks. It outlives the process, not the boot.

A row is written before the kernel is touched (intent), and marked after (commit), so that whatever a killed daemon
leaves is either described here or was never begun. It is SQLite in WAL mode without fsync: the page cache holds what a
killed process wrote, and what the journal describes, the node's namespaces, dies with the machine anyway. One insert
costs 40–60 µs, and so runs on the event loop.

The tables, one row per …

    attachment   (network, container id, interface) that ADD made or is making; `body` is the Attachment as JSON
    host_port    port of the node that leads to one of these; it goes with its row, and so is another's at once
    releasing    host interface that DEL has taken down and whose deletion is not yet seen
    cooling      address that is not to be reused before `until`, in seconds since boot: a wall clock may jump
    block        block of this node, so that pods start while etcd is away
    meta         the boot that the rest belongs to, the last address given, whether the peers were programmed once

A file of another boot is emptied but for its blocks: nothing else in it exists any more. A file that cannot be read
is set aside under a name of its own, and the caller is told to rebuild from the kernel.
"""

from __future__ import annotations

import ipaddress
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from ipam_daemon.faults import point
from ipam_daemon.model import Address, Attachment, AttachmentKey, AttachmentState, Block, Interface, decode, encode
from podwire.errors import PodwireError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attachment (
    network TEXT, container_id TEXT, ifname TEXT, body BLOB NOT NULL,
    PRIMARY KEY (network, container_id, ifname)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS host_port (
    protocol TEXT, port INTEGER, host_ip TEXT, network TEXT, container_id TEXT, ifname TEXT,
    PRIMARY KEY (protocol, port, host_ip)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS releasing (host_ifname TEXT PRIMARY KEY, addresses TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cooling (address TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS block (cidr TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""

# A version that knows no ports of the node deletes rows of attachments, and theirs would be taken for good.
_DROP_UNOWNED = """
DELETE FROM host_port WHERE NOT EXISTS (
    SELECT 1 FROM attachment WHERE attachment.network = host_port.network
    AND attachment.container_id = host_port.container_id AND attachment.ifname = host_port.ifname)
"""


class JournalDamaged(PodwireError):
    """The file of a running daemon can no longer be read. The next start sets it aside and rebuilds it."""


class Releasing(msgspec.Struct, frozen=True, kw_only=True):
    """A wire that is being deleted, and the addresses that are free once it is gone."""

    host_ifname: str
    addresses: tuple[Interface, ...]


class Journal:
    """The journal of one node. Not thread-safe: it belongs to the event loop's thread."""

    def __init__(self, path: Path, boot_id: str) -> None:
        """Opens the journal at `path`, or begins one. `boot_id` is /proc/sys/kernel/random/boot_id.

        `set_aside` is where a file that could not be read was moved to, None in the ordinary case. `begun` is True when
        there was no journal of this boot.
        """
        self.set_aside: Path | None = None
        self._path = path
        try:
            self._db = _open(path)
            self._read_all()
        except sqlite3.OperationalError:  # no such folder, disk full, locked: nothing is wrong with the file
            raise
        except sqlite3.DatabaseError:
            self.set_aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
            path.rename(self.set_aside)
            for companion in ("-wal", "-shm"):
                path.with_name(path.name + companion).unlink(missing_ok=True)
            self._db = _open(path)
        self._inodes = _inodes(path)
        self.begun = self.meta("boot_id") != boot_id
        if self.begun:
            with self._transaction():
                for table in ("attachment", "host_port", "releasing", "cooling", "meta"):
                    self._db.execute(f"DELETE FROM {table}")
                self.set_meta("boot_id", boot_id)
        self._db.execute(_DROP_UNOWNED)

    def _read_all(self) -> None:
        """Rows that cannot be read, of another version perhaps, are damage like any other, and better found now."""
        try:
            _ = self.attachments(), self.releasing(), self.cooling(), self.blocks(), self.last()
        except (sqlite3.Error, msgspec.DecodeError, ValueError) as error:
            self._db.close()
            raise sqlite3.DatabaseError(f"a row cannot be read: {error}") from error

    def look_after(self) -> bool:
        """Writes the file again when somebody removed or overwrote it or its write-ahead log. Returns whether it did.

        What this process has read and written is in memory, whatever became of the file. Raises JournalDamaged when
        that is not enough. Costs 2 ms with 250 attachments.
        """
        try:
            _ = self.attachments(), self.releasing(), self.cooling(), self.blocks(), self.last()
            if _inodes(self._path) == self._inodes and _is_sound(self._path):
                return False
            self._write_again()
        except sqlite3.OperationalError:  # a full disk: it comes again
            raise
        except (sqlite3.DatabaseError, msgspec.DecodeError, ValueError) as error:
            raise JournalDamaged(f"{self._path}: {error}; the next start rebuilds it from the kernel") from error
        return True

    def _write_again(self) -> None:
        copy = self._path.with_name(f"{self._path.name}.new")
        copy.unlink(missing_ok=True)
        with sqlite3.connect(copy) as target:
            self._db.backup(target)
        target.close()
        self._db.close()
        for companion in ("-wal", "-shm"):
            self._path.with_name(self._path.name + companion).unlink(missing_ok=True)
        copy.rename(self._path)
        self._db = _open(self._path)
        self._inodes = _inodes(self._path)

    def close(self) -> None:
        """Closes the file; everything written is in it."""
        self._db.close()

    # --- attachments

    def intend(self, attachment: Attachment) -> None:
        """Records that a wire is about to be made. Raises sqlite3.IntegrityError when the key has a row, or one of its
        ports of the node is another's."""
        with self._transaction():
            self._insert(attachment)
            point("journal.intending")
            self.set_meta("last", ",".join(str(each.ip) for each in attachment.addresses))

    def adopt(self, attachment: Attachment) -> None:
        """Records a wire that was found in the kernel when the journal was lost. Raises as `intend` does."""
        with self._transaction():
            self._insert(attachment)

    def commit(self, attachment: Attachment) -> Attachment:
        """Records that the wire is made, and returns the attachment as it now stands."""
        attached = msgspec.structs.replace(attachment, state=AttachmentState.ATTACHED)
        self.replace(attached)
        return attached

    def replace(self, attachment: Attachment) -> None:
        """Records that an attachment has changed. One that is gone is not brought back."""
        self._db.execute(
            "UPDATE attachment SET body = ? WHERE network = ? AND container_id = ? AND ifname = ?",
            (encode(attachment), *_row_key(attachment.key)),
        )

    def get(self, key: AttachmentKey) -> Attachment | None:
        """The attachment of `key`, None when there is none or only one that is releasing."""
        row = self._db.execute(
            "SELECT body FROM attachment WHERE network = ? AND container_id = ? AND ifname = ?", _row_key(key)
        ).fetchone()
        return decode(row[0], Attachment) if row else None

    def attachments(self) -> tuple[Attachment, ...]:
        """Every attachment that is not releasing."""
        return tuple(decode(body, Attachment) for (body,) in self._db.execute("SELECT body FROM attachment"))

    def forget(self, key: AttachmentKey) -> None:
        """Removes the row of an ADD that made no wire."""
        for table in ("host_port", "attachment"):  # in this order: what is left in between is undone by the row
            self._db.execute(
                f"DELETE FROM {table} WHERE network = ? AND container_id = ? AND ifname = ?", _row_key(key)
            )

    def claimants(self, protocol: str, port: int) -> tuple[tuple[Address | None, AttachmentKey], ...]:
        """Who has a port of the node, at which of its addresses (None: all)."""
        rows = self._db.execute(
            "SELECT host_ip, network, container_id, ifname FROM host_port WHERE protocol = ? AND port = ?",
            (protocol, port),
        ).fetchall()
        return tuple((ipaddress.ip_address(text) if text else None, AttachmentKey(*key)) for text, *key in rows)

    # --- on the way out

    def release(self, attachment: Attachment) -> None:
        """Turns the attachment into a wire to be deleted, in one transaction."""
        with self._transaction():
            self.forget(attachment.key)
            point("journal.releasing")
            self._db.execute(
                "INSERT OR REPLACE INTO releasing VALUES (?, ?)",
                (attachment.host_ifname, ",".join(map(str, attachment.addresses))),
            )

    def condemn(self, host_ifname: str) -> None:
        """Records a wire to be deleted whose addresses are not its own: nothing is free when it is gone."""
        self._db.execute("INSERT OR IGNORE INTO releasing VALUES (?, '')", (host_ifname,))

    def releasing(self) -> tuple[Releasing, ...]:
        """Every wire that is to be deleted."""
        rows = self._db.execute("SELECT host_ifname, addresses FROM releasing").fetchall()
        return tuple(
            Releasing(
                host_ifname=name,
                addresses=tuple(ipaddress.ip_interface(text) for text in filter(None, texts.split(","))),
            )
            for name, texts in rows
        )

    def cool(self, gone: Iterable[Releasing], now: float, until: float) -> None:
        """Records wires that were seen gone; their addresses cool from `now` to `until` (seconds since boot)."""
        with self._transaction():
            for each in gone:
                self._db.execute("DELETE FROM releasing WHERE host_ifname = ?", (each.host_ifname,))
                point("journal.cooling")
                self._db.executemany(
                    "INSERT OR REPLACE INTO cooling VALUES (?, ?)", [(str(a.ip), until) for a in each.addresses]
                )
            self._db.execute("DELETE FROM cooling WHERE until <= ?", (now,))

    def begin_with(self, cooling: Iterable[Address], until: float, last: Iterable[Address]) -> None:
        """What is known of the time before this journal was begun: these cool, and those were handed out last."""
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO cooling VALUES (?, ?)", [(str(a), until) for a in cooling])
            self.set_meta("last", ",".join(map(str, last)))

    def cooling(self) -> dict[Address, float]:
        """Address → when it is cool, in seconds since boot."""
        return {ipaddress.ip_address(a): until for a, until in self._db.execute("SELECT address, until FROM cooling")}

    # --- the node

    def blocks(self) -> tuple[Block, ...]:
        """The blocks that etcd last said are this node's."""
        return tuple(decode(body, Block) for (body,) in self._db.execute("SELECT body FROM block"))

    def set_blocks(self, blocks: Iterable[Block]) -> None:
        """Records the blocks that etcd says are this node's."""
        with self._transaction():
            self._db.execute("DELETE FROM block")
            point("journal.setting-blocks")
            self._db.executemany("INSERT INTO block VALUES (?, ?)", [(str(b.cidr), encode(b)) for b in blocks])

    def last(self) -> tuple[Address, ...]:
        """The addresses that were handed out last, one per family."""
        return tuple(ipaddress.ip_address(text) for text in filter(None, (self.meta("last") or "").split(",")))

    def meta(self, name: str) -> str | None:
        """A value by name."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None

    def set_meta(self, name: str, value: str) -> None:
        """Records a value by name."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block or, when it raises, none of it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite itself has rolled back what a full disk stopped
                self._db.execute("ROLLBACK")
            raise

    def _insert(self, attachment: Attachment) -> None:
        key = _row_key(attachment.key)
        self._db.execute("INSERT INTO attachment VALUES (?, ?, ?, ?)", (*key, encode(attachment)))
        self._db.executemany(
            "INSERT INTO host_port VALUES (?, ?, ?, ?, ?, ?)",
            [(each.protocol, each.host_port, str(each.host_ip or ""), *key) for each in attachment.port_mappings],
        )


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = OFF")
        db.executescript(_SCHEMA)
        if db.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError(f"{path}: quick_check failed")
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


def _is_sound(path: Path) -> bool:
    """Whether a process that starts now could read the file."""
    with closing(sqlite3.connect(path)) as reader:
        try:
            return bool(reader.execute("PRAGMA quick_check").fetchone() == ("ok",))
        except sqlite3.DatabaseError:
            return False


def _inodes(path: Path) -> tuple[int, ...]:
    """Which files the names lead to. SQLite has them open, and goes on writing to them when they are removed."""
    return tuple(os.stat(f"{path}{end}").st_ino if os.path.exists(f"{path}{end}") else 0 for end in ("", "-wal"))


def _row_key(key: AttachmentKey) -> tuple[str, str, str]:
    return key.network, key.container_id, key.ifname
