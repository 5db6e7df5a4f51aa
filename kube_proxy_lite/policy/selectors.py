"""Label selectors, in one canonical form: equal selectors compare equal, however a manifest writes them.

`matchLabels` are requirements of one value each. NotIn and DoesNotExist hold where the label is absent
(k8s.io/apimachinery/pkg/labels). An operator that there is not, or In without values, selects nothing: a selector that
cannot be understood must not open anything, and must still isolate nobody else's pods.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from podwire.kube.objects import LabelSelector

_OPERATORS = ("In", "NotIn", "Exists", "DoesNotExist")


class Requirement(msgspec.Struct, frozen=True, order=True, cache_hash=True):
    """One condition on the label `key`; `values` are sorted."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether an object with these labels satisfies it."""
        if self.operator == "In":
            return self.key in labels and labels[self.key] in self.values
        if self.operator == "NotIn":
            return self.key not in labels or labels[self.key] not in self.values
        return (self.key in labels) is (self.operator == "Exists")


class Selector(msgspec.Struct, frozen=True, order=True, cache_hash=True):
    """All `requirements`, which are sorted, must hold; without any it selects everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether an object with these labels is selected."""
        return all(requirement.holds(labels) for requirement in self.requirements)

    @property
    def handle(self) -> tuple[str, str] | None:
        """A (key, value) that whatever is selected has among its labels; None when there is no single one."""
        for requirement in self.requirements:
            if requirement.operator == "In" and len(requirement.values) == 1:
                return requirement.key, requirement.values[0]
        return None


EVERYTHING = Selector()


def parse(selector: LabelSelector) -> tuple[Selector, str]:
    """The selector, and what is wrong with it in words, empty when nothing is."""
    found = {Requirement(key, "In", (value,)) for key, value in (selector.match_labels or {}).items()}
    wrong = ""
    for each in selector.match_expressions or ():
        values = tuple(sorted(set(each.values or ())))
        if each.operator not in _OPERATORS:
            wrong = f"operator of {each.key} is {each.operator!r}, expected one of {', '.join(_OPERATORS)}"
            found.add(Requirement(each.key, "In"))
        else:
            found.add(Requirement(each.key, each.operator, values if each.operator in ("In", "NotIn") else ()))
            if each.operator in ("In", "NotIn") and not values:
                wrong = f"values of {each.key} are empty, expected at least one for operator {each.operator}"
    return Selector(tuple(sorted(found))), wrong
