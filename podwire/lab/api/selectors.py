"""Label and field selectors, as the query parameters `labelSelector` and `fieldSelector` write them.

    app=web,tier!=cache,env in (dev, test),zone notin (a),canary,!legacy        spec.nodeName=node1,status.phase!=Failed

`!=` and `notin` hold for an object that has no such label (k8s.io/apimachinery/pkg/labels). A field that a kind does
not offer is an error, since a selector that silently matches nothing looks like an empty cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from podwire.lab.api.errors import BadRequest
from podwire.lab.api.kinds import Kind

_KEY = r"[A-Za-z0-9][A-Za-z0-9._/-]*"
_LABEL_TERM = re.compile(
    rf"\s*(?:(?P<absent>!)\s*(?P<a>{_KEY})"
    rf"|(?P<s>{_KEY})\s+(?P<set>in|notin)\s*\((?P<values>[^()]*)\)"
    rf"|(?P<e>{_KEY})\s*(?P<op>==|=|!=)\s*(?P<value>[A-Za-z0-9._-]*)"
    rf"|(?P<x>{_KEY}))\s*(?:,|$)"
)
_FIELD_TERM = re.compile(r"\s*([A-Za-z0-9.]+)\s*(==|=|!=)\s*(.*?)\s*")
COMMON_FIELDS = ("metadata.name", "metadata.namespace")


class Term(msgspec.Struct, frozen=True):
    """One condition. `values` None asks only whether the key is there; `wanted` False turns the condition round."""

    key: str
    values: frozenset[str] | None
    wanted: bool = True

    def holds(self, value: str | None) -> bool:
        """Whether a value (None: no such key) satisfies it."""
        found = value is not None if self.values is None else value in self.values
        return found is self.wanted


class Selector(msgspec.Struct, frozen=True):
    """All terms must hold. An empty selector matches everything."""

    labels: tuple[Term, ...] = ()
    fields: tuple[Term, ...] = ()

    def matches(self, obj: Mapping[str, Any]) -> bool:
        """Whether the object is selected."""
        if self.labels:
            labels = obj["metadata"].get("labels") or {}
            if not all(term.holds(labels.get(term.key)) for term in self.labels):
                return False
        return all(term.holds(_field(obj, term.key)) for term in self.fields)


EVERYTHING = Selector()


def parse(kind: Kind, labels: str = "", fields: str = "") -> Selector:
    """The selector that the two query parameters say. Raises BadRequest, quoting the part that is wrong."""
    if not labels.strip() and not fields.strip():
        return EVERYTHING
    return Selector(labels=_label_terms(labels), fields=_field_terms(kind, fields))


def from_object(selector: Mapping[str, Any] | None) -> Selector:
    """A `LabelSelector` (meta/v1: matchLabels, matchExpressions) as it stands in specs. An empty one matches all.

    Raises BadRequest for an operator that there is not.
    """
    terms = [Term(key, frozenset((value,))) for key, value in ((selector or {}).get("matchLabels") or {}).items()]
    for one in (selector or {}).get("matchExpressions") or ():
        if one.get("operator") not in _OPERATORS:
            raise BadRequest(f"operator {one.get('operator')!r} is not one of {', '.join(_OPERATORS)}")
        by_value, wanted = _OPERATORS[one["operator"]]
        terms.append(Term(one["key"], frozenset(one.get("values") or ()) if by_value else None, wanted))
    return Selector(labels=tuple(terms))


def to_text(selector: Selector) -> str:
    """The label terms as a query parameter writes them; `parse` reads it back."""
    return ",".join(_term_text(term) for term in selector.labels)


def _term_text(term: Term) -> str:
    if term.values is None:
        return term.key if term.wanted else f"!{term.key}"
    if len(term.values) == 1:
        return f"{term.key}{'=' if term.wanted else '!='}{next(iter(term.values))}"
    return f"{term.key} {'in' if term.wanted else 'notin'} ({','.join(sorted(term.values))})"


def _label_terms(text: str) -> tuple[Term, ...]:
    terms, at = [], 0
    text = text.strip()
    while at < len(text):
        match = _LABEL_TERM.match(text, at)
        if match is None:
            raise BadRequest(f"labelSelector: cannot read {text[at:]!r}; write it as app=web,env in (dev,test),!legacy")
        terms.append(_label_term(match))
        at = match.end()
    return tuple(terms)


def _label_term(match: re.Match[str]) -> Term:
    if match["absent"]:
        return Term(match["a"], None, wanted=False)
    if match["set"]:
        values = frozenset(value.strip() for value in match["values"].split(","))
        return Term(match["s"], values, wanted=match["set"] == "in")
    if match["op"]:
        return Term(match["e"], frozenset((match["value"],)), wanted=match["op"] != "!=")
    return Term(match["x"], None)


def _field_terms(kind: Kind, text: str) -> tuple[Term, ...]:
    offered = (*COMMON_FIELDS, *kind.fields)
    terms = []
    for part in filter(str.strip, text.split(",")):
        match = _FIELD_TERM.fullmatch(part)
        if match is None:
            raise BadRequest(f"fieldSelector: cannot read {part!r}; write it as metadata.name=web")
        if match[1] not in offered:
            raise BadRequest(
                f"fieldSelector: {match[1]!r} is not a field label of {kind.resource}; there are {', '.join(offered)}"
            )
        terms.append(Term(match[1], frozenset((match[3],)), wanted=match[2] != "!="))
    return tuple(terms)


def _field(obj: Mapping[str, Any], path: str) -> str:
    """A field as text: an absent one is empty, booleans are lower-case."""
    value: Any = obj
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    if value is None:
        return "false" if path in _BOOLEANS else ""
    return str(value).lower() if isinstance(value, bool) else str(value)


_OPERATORS = {"In": (True, True), "NotIn": (True, False), "Exists": (False, True), "DoesNotExist": (False, False)}
_BOOLEANS = ("spec.hostNetwork", "spec.unschedulable")
