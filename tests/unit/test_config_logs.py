"""Configuration files and logs: strict in, one line of JSON out."""

from __future__ import annotations

import ipaddress
import json
import logging
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from podwire.config import ConfigError, load
from podwire.logs import JsonFormatter


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int = 1


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str = "default"
    inner: Inner = Inner()


GOOD = {
    "an empty file": ("", Outer()),
    "comments alone": ("# nothing yet\n", Outer()),
    "some of it": ("inner: {size: 3}\n", Outer(inner=Inner(size=3))),
}


@pytest.mark.parametrize(("text", "expected"), GOOD.values(), ids=GOOD.keys())
def test_what_a_file_says(tmp_path: Path, text: str, expected: Outer) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert load(tmp_path / "c.yaml", Outer) == expected


BAD = {
    "no YAML": (b"a: [1", "not YAML"),
    "no text": (b"\xff\xfe\xff", "not YAML"),
    "two documents": (b"name: a\n---\nname: b\n", "not YAML"),
    "a date that is none": (b"name: 2024-13-45\n", "not YAML"),
    "a key that is a list": (b"[1]: 2\n", "not YAML"),
    "a document that contains itself": (b"inner: &a {size: *a}\n", r"\$.inner.size"),
    "an object of Python": (b"!!python/object/apply:os.system ['true']", "not YAML"),
    "a list": (b"- name: a\n", "Expected `object`, got `array`"),
    "an unknown key": (b"nmae: a\n", "unknown field `nmae`"),
    "an unknown key inside": (b"inner: {sizes: 1}\n", r"unknown field `sizes` - at `\$.inner`"),
    "a wrong type inside": (b"inner: {size: big}\n", r"Expected `int`, got `str` - at `\$.inner.size`"),
}


@pytest.mark.parametrize(("data", "says"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=says) as caught:
        load(path, Outer)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load(tmp_path / "absent.yaml", Outer)


def line(message: str, **extra: object) -> dict[str, object]:
    record = logging.LogRecord("podwire.x", logging.WARNING, __file__, 1, message, None, None)
    record.__dict__.update(extra)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    decoded = json.loads(text)
    assert isinstance(decoded, dict)
    return decoded


def test_a_record_is_one_line() -> None:
    got = line("first\nsecond")
    assert (got["level"], got["logger"], got["message"]) == ("warning", "podwire.x", "first\nsecond")
    assert str(got["time"]).endswith("+00:00")


def test_fields_stand_beside_the_message() -> None:
    got = line("added", fields={"address": ipaddress.ip_address("10.244.1.3"), "link": "pw1"})
    assert (got["address"], got["link"], got["message"]) == ("10.244.1.3", "pw1", "added")


def test_a_field_does_not_hide_the_message() -> None:
    assert line("added", fields={"message": "other", "level": 7})["message"] == "added"


def test_an_exception_is_in_the_line() -> None:
    try:
        raise ValueError("what went wrong")
    except ValueError:
        got = line("failed", exc_info=sys.exc_info())
    assert "ValueError: what went wrong" in str(got["error"])


def test_logs_go_to_standard_error_from_the_level_on() -> None:
    program = "import logging; from podwire.logs import configure; configure('warning'); l = logging.getLogger('x'); "
    program += "l.info('quiet'); l.warning('loud %d', 1)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=90)
    assert done.stdout == ""
    (only,) = done.stderr.splitlines()
    assert json.loads(only)["message"] == "loud 1"
