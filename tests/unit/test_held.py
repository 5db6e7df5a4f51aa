"""The addresses of the time before a boot: what is written is read, and what cannot be read is not believed."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from ipam_daemon.held import Held, HeldFile

HELD = Held(
    addresses=tuple(map(ipaddress.ip_address, ("10.244.1.3", "10.244.1.4", "fd00::3"))),
    last=(ipaddress.ip_address("10.244.1.4"), ipaddress.ip_address("fd00::3")),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "held.json"


def test_what_was_written_is_read(path: Path) -> None:
    HeldFile(path).write(HELD)
    assert HeldFile(path).read() == HELD
    assert [each.name for each in path.parent.iterdir()] == ["held.json"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="absent"),
        pytest.param(b"", id="empty"),
        pytest.param(b'{"addresses": ["10.244.1.', id="half"),
        pytest.param(b'{"addresses": ["10.244.1.300"]}', id="no address"),
        pytest.param(b"\xff\xfe\x00", id="bytes"),
        pytest.param(b"[]", id="something else"),
    ],
)
def test_what_cannot_be_read_is_nothing(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    assert HeldFile(path).read() == Held()


def test_a_write_that_fails_leaves_the_former_file(path: Path) -> None:
    HeldFile(path).write(HELD)
    path.with_suffix(".new").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        HeldFile(path).write(Held())
    assert HeldFile(path).read() == HELD
