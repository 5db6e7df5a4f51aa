"""CNI errors as text, on the ways that fail: what `json` costs to import matters less there."""

import json

from cni_plugin.environment import SUPPORTED_VERSIONS


def render(code: int, msg: str, details: str, stdin: bytes) -> bytes:
    """One line of JSON (CNI specification § Error), in the version that the configuration on `stdin` asks for."""
    error = {"cniVersion": version_of(stdin), "code": code, "msg": _one_line(msg), "details": _one_line(details)}
    return json.dumps(error).encode() + b"\n"


def version_of(stdin: bytes) -> str:
    """The cniVersion of a configuration, the newest that we know when it names none, or is none."""
    try:
        configuration = json.loads(stdin)
    except (ValueError, RecursionError):
        configuration = None
    version = configuration.get("cniVersion") if isinstance(configuration, dict) else None
    return version if version in SUPPORTED_VERSIONS else SUPPORTED_VERSIONS[-1]


def _one_line(text: str) -> str:
    return " ".join(text.split())
