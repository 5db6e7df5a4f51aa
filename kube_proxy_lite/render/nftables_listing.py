"""What `nft -p list table` prints, read back: elements, and the rules of chains. Pure.

The text form, because it is the one that is written, too: an element is listed as it was sent, so that reading 100,000
of them back is a matter of splitting lines and comparing texts (JSON takes nft as long and Python several times that).
What others may have put in (comments, counters, timeouts of elements) is cut off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

from kube_proxy_lite.render.nftables_layout import SHAPE, is_hook

_COMMENT = re.compile(r'comment "([^"]*)"')
_EXTRAS = re.compile(r" (?:timeout|expires|counter|comment|last)\b[^:,]*(?= : |,|$)")


class TableListing(msgspec.Struct):
    """One table: `sets` name → key → value (empty for a set's), `chains` name → rules, `hooks` of base chains."""

    sets: dict[str, dict[str, str]] = {}
    chains: dict[str, tuple[str, ...]] = {}
    hooks: dict[str, str] = {}

    @property
    def mark(self) -> str:
        """What the table was made from; empty when it does not say."""
        found = [match[1] for rule in self.chains.get(SHAPE, ()) if (match := _COMMENT.search(rule))]
        return found[0] if found else ""


Listing = Mapping[int, TableListing | None]
"""The version of a family → its table, None for none."""


def parse_table(text: str) -> TableListing:
    """The table in `text`."""
    listing = TableListing()
    for kind, name, body in _blocks(text):
        if kind == "chain":
            lines = tuple(map(str.strip, body))
            if is_hook(lines):
                listing.hooks[name] = lines[0]
            listing.chains[name] = lines[is_hook(lines) :]
        else:
            listing.sets[name] = _elements("\n".join(body))
    return listing


def _blocks(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(set, map or chain; its name; its lines)."""
    kind = name = ""
    body: list[str] = []
    for line in text.split("\n"):
        if line == "\t}":
            if kind:
                yield kind, name, body
            kind, body = "", []
        elif kind:
            body.append(line)
        elif line.startswith("\t") and line.endswith(" {"):
            kind, name = line.split()[:2]


def _elements(body: str) -> dict[str, str]:
    start = body.find("elements = {")
    if start < 0:
        return {}
    inner = body[start + len("elements = {") : body.rindex("}")]
    if '"' in inner:
        inner = _COMMENT.sub("comment", inner)
    if _EXTRAS.search(inner):
        inner = _EXTRAS.sub("", inner)
    found: dict[str, str] = {}
    for item in inner.split(","):
        key, _, value = item.strip().partition(" : ")
        found[key] = value
    return found
