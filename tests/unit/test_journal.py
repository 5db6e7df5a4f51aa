"""The journal: what one daemon wrote, the next one reads, whatever happened to the file or the machine in between."""

from __future__ import annotations

import ipaddress
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from ipam_daemon.journal import Journal, Releasing
from ipam_daemon.model import Attachment, AttachmentKey, AttachmentState, Block, PodRef, PortMapping

BOOT = "boot-1"


def attachment(container_id: str = "c1", address: str = "10.244.1.3/24") -> Attachment:
    return Attachment(
        key=AttachmentKey("podnet", container_id, "eth0"),
        netns=f"/run/netns/{container_id}",
        host_ifname=f"pw{container_id}",
        mac="0a:58:0a:f4:01:03",
        mtu=1450,
        addresses=(ipaddress.ip_interface(address), ipaddress.ip_interface("fd00::3/120")),
        pod=PodRef(namespace="default", name="web", uid="u1"),
        created=1700000000.25,
        created_ns=12345,
    )


def block(cidr: str = "10.244.1.0/24") -> Block:
    return Block(cidr=ipaddress.ip_network(cidr), pool="default", node="n", node_id="i", generation=3)


def reopened(journal: Journal, path: Path, boot: str = BOOT) -> Journal:
    journal.close()
    return Journal(path, boot)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def test_a_new_journal_is_empty(path: Path) -> None:
    journal = Journal(path, BOOT)
    assert (journal.attachments(), journal.releasing(), journal.cooling(), journal.blocks()) == ((), (), {}, ())
    assert journal.last() == ()
    assert journal.set_aside is None
    journal.close()


def test_an_attachment_from_intent_to_the_end(path: Path) -> None:
    journal, it = Journal(path, BOOT), attachment()
    journal.intend(it)
    journal = reopened(journal, path)
    assert journal.get(it.key) == it
    assert it.state is AttachmentState.ADDING

    attached = journal.commit(it)
    journal = reopened(journal, path)
    assert journal.attachments() == (attached,)
    assert attached.state is AttachmentState.ATTACHED

    journal.release(attached)
    journal = reopened(journal, path)
    assert journal.get(it.key) is None
    (wire,) = journal.releasing()
    assert wire == Releasing(host_ifname="pwc1", addresses=it.addresses)

    journal.cool([wire], now=100.0, until=130.0)
    journal = reopened(journal, path)
    assert journal.releasing() == ()
    assert journal.cooling() == {each.ip: 130.0 for each in it.addresses}
    journal.close()


def test_an_intent_of_a_key_that_has_a_row_changes_nothing(path: Path) -> None:
    journal, it = Journal(path, BOOT), attachment()
    journal.intend(it)
    with pytest.raises(sqlite3.IntegrityError):
        journal.intend(attachment(address="10.244.1.4/24"))
    assert journal.attachments() == (it,)
    assert journal.last() == tuple(each.ip for each in it.addresses)
    journal.intend(attachment("c2", "10.244.1.5/24"))
    assert len(journal.attachments()) == 2
    journal.close()


def test_an_add_that_made_no_wire_is_forgotten(path: Path) -> None:
    journal, it = Journal(path, BOOT), attachment()
    journal.intend(it)
    journal.forget(it.key)
    assert reopened(journal, path).attachments() == ()


def test_what_has_cooled_is_forgotten_when_the_next_one_cools(path: Path) -> None:
    journal = Journal(path, BOOT)
    old, new = (ipaddress.ip_interface(each) for each in ("10.244.1.3/24", "10.244.1.4/24"))
    journal.cool([Releasing(host_ifname="pw1", addresses=(old,))], now=100.0, until=130.0)
    journal.cool([Releasing(host_ifname="pw2", addresses=(new,))], now=131.0, until=161.0)
    assert journal.cooling() == {new.ip: 161.0}
    journal.close()


def test_blocks_are_replaced_as_a_whole(path: Path) -> None:
    journal = Journal(path, BOOT)
    journal.set_blocks([block(), block("10.244.2.0/24")])
    journal.set_blocks([block("10.244.2.0/24")])
    assert reopened(journal, path).blocks() == (block("10.244.2.0/24"),)


def test_another_boot_keeps_only_the_blocks(path: Path) -> None:
    journal = Journal(path, BOOT)
    journal.set_blocks([block()])
    journal.intend(attachment("c1"))
    journal.release(journal.commit(attachment("c1")))
    journal.cool(journal.releasing(), now=1.0, until=31.0)
    journal.intend(attachment("c2"))
    journal.release(attachment("c2"))
    journal.intend(attachment("c3"))
    journal.set_meta("converged", "yes")
    journal = reopened(journal, path, "boot-2")
    assert journal.blocks() == (block(),)
    assert (journal.attachments(), journal.releasing(), journal.cooling(), journal.last()) == ((), (), {}, ())
    assert journal.meta("converged") is None
    assert journal.set_aside is None
    journal.close()


def no_database(path: Path) -> None:
    path.write_bytes(b"this is not a database at all, it only looks like a file" * 200)


def torn_in_the_middle(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(8192))


def an_attachment_that_cannot_be_read(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE attachment SET body = ?", (b'{"key": "not the shape of today"}',))
    db.close()


def a_block_that_cannot_be_read(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE block SET body = ?", (b"not JSON",))
    db.close()


def tables_of_another_shape(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE releasing")
        db.execute("CREATE TABLE releasing (something_else TEXT)")
    db.close()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "no database": no_database,
    "torn in the middle": torn_in_the_middle,
    "an attachment that cannot be read": an_attachment_that_cannot_be_read,
    "a block that cannot be read": a_block_that_cannot_be_read,
    "tables of another shape": tables_of_another_shape,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_file_that_cannot_be_read_is_set_aside(path: Path, damage: Callable[[Path], None]) -> None:
    journal = Journal(path, BOOT)
    journal.set_blocks([block()])
    for number in range(200):
        journal.intend(attachment(f"c{number}"))
    journal.close()
    damage(path)
    broken = path.read_bytes()

    journal = Journal(path, BOOT)
    assert journal.set_aside is not None
    assert journal.set_aside.read_bytes() == broken, "what is left of it is kept for whoever looks into it"
    assert journal.attachments() == ()
    journal.intend(attachment())
    journal = reopened(journal, path)
    assert journal.set_aside is None
    assert journal.attachments() == (attachment(),)
    journal.close()


def test_a_missing_folder_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        Journal(tmp_path / "absent" / "journal.db", BOOT)


WRITER = """
import os, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from test_journal import BOOT, attachment
from ipam_daemon.journal import Journal
journal = Journal(Path({path!r}), BOOT)
for number in range(100):
    journal.intend(attachment(f"c{{number}}"))
    print(number, flush=True)
os.kill(os.getpid(), {signal})
"""


def test_a_killed_process_loses_nothing(path: Path) -> None:
    script = WRITER.format(here=str(Path(__file__).parent), path=str(path), signal=int(signal.SIGKILL))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == -signal.SIGKILL, done.stderr
    journal = Journal(path, BOOT)
    assert len(journal.attachments()) == 100
    assert journal.set_aside is None
    journal.close()


FORMER_SCHEMA = """
CREATE TABLE attachment (
    network TEXT, container_id TEXT, ifname TEXT, body BLOB NOT NULL,
    PRIMARY KEY (network, container_id, ifname)) WITHOUT ROWID;
CREATE TABLE releasing (host_ifname TEXT PRIMARY KEY, addresses TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE cooling (address TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE block (cidr TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO attachment VALUES ('podnet', 'c1', 'eth0', '{"key":{"network":"podnet","container_id":"c1","ifname":"eth0"},
    "netns":"/run/netns/c1","host_ifname":"pw0123456789ab","mac":"0a:58:0a:f4:01:03","mtu":1450,
    "addresses":["10.244.1.3/24"],"pod":{"namespace":"default","name":"web","uid":"u1"},"state":"attached",
    "created":1700000000.25,"created_ns":12345}');
INSERT INTO releasing VALUES ('pwba9876543210', '10.244.1.4/24');
INSERT INTO cooling VALUES ('10.244.1.5', 99.5);
INSERT INTO block VALUES ('10.244.1.0/24',
    '{"cidr":"10.244.1.0/24","pool":"default","node":"n","nodeId":"i","generation":3}');
INSERT INTO meta VALUES ('boot_id', 'boot-1'), ('last', '10.244.1.5'), ('converged', 'yes');
"""


def test_the_journal_of_the_version_before_ports_and_limits_is_read(path: Path) -> None:
    """As it wrote it: a daemon is upgraded while pods run."""
    with closing(sqlite3.connect(path)) as former:
        former.executescript(FORMER_SCHEMA)
    journal = Journal(path, BOOT)
    (row,) = journal.attachments()
    assert (row.key.container_id, row.state, row.port_mappings, bool(row.bandwidth)) == (
        "c1",
        AttachmentState.ATTACHED,
        (),
        False,
    )
    assert [each.host_ifname for each in journal.releasing()] == ["pwba9876543210"]
    assert list(journal.cooling().values()) == [99.5]
    assert (journal.blocks(), journal.set_aside, journal.begun) == ((block(),), None, False)
    journal.close()


def test_a_port_of_the_node_is_free_when_a_former_version_has_deleted_its_pod(path: Path) -> None:
    """That one knows nothing of the table of ports."""
    mapping = PortMapping(protocol="tcp", host_port=8080, container_port=80)
    one, other = (msgspec.structs.replace(attachment(each), port_mappings=(mapping,)) for each in ("c1", "c2"))
    journal = Journal(path, BOOT)
    journal.intend(one)
    journal.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as former:
        former.execute("DELETE FROM attachment")
    journal = Journal(path, BOOT)
    assert journal.claimants("tcp", 8080) == ()
    journal.intend(other)
    journal = reopened(journal, path)
    assert [key.container_id for _, key in journal.claimants("tcp", 8080)] == ["c2"]
    journal.close()
