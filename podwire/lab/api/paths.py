"""The API's paths, taken apart: which kind, namespace, name and subresource a URL means.

/api/v1/namespaces/NS/pods/NAME/status        /apis/GROUP/VERSION/namespaces/NS/PLURAL/NAME
/api/v1/nodes/NAME                            /apis/GROUP/VERSION/PLURAL          (all namespaces, or none)
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from podwire.lab.api.errors import NotFound


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a path names. Empty `name`: the collection; empty `namespace`: all of them, or a cluster-wide kind."""

    group: str
    version: str
    plural: str
    namespace: str = ""
    name: str = ""
    subresource: str = ""


def parse(group: str, version: str, rest: Sequence[str]) -> Target:
    """The target of the (already unquoted) path steps that follow group and version. Raises NotFound."""
    steps, namespace = tuple(rest), ""
    if len(steps) > 2 and steps[0] == "namespaces" and not (len(steps) == 3 and steps[2] in ("status", "finalize")):
        namespace, steps = steps[1], steps[2:]
    if not 1 <= len(steps) <= 3 or not all(steps):
        raise NotFound("the server could not find the requested resource")
    plural, name, subresource = (*steps, "", "")[:3]
    return Target(group=group, version=version, plural=plural, namespace=namespace, name=name, subresource=subresource)
