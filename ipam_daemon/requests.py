"""The executable's request as a `Call`, and the API range that both sides agree on."""

from __future__ import annotations

from ipam_daemon import cni
from ipam_daemon.cni import Call
from ipam_daemon.errors import TryAgainLater
from podwire.v1 import cni_pb2

API_MIN = API_MAX = 1


def negotiate(request: cni_pb2.CallRequest) -> int:
    """The highest API version that both sides know.

    Raises TryAgainLater when there is none: an executable and a daemon that are too far apart meet in the middle of an
    upgrade, which ends.
    """
    highest = min(API_MAX, request.api_max)
    if highest < max(API_MIN, request.api_min):
        raise TryAgainLater(
            f"the executable speaks API {request.api_min} to {request.api_max}, the daemon {API_MIN} to {API_MAX}; "
            "install the executable of the daemon's version"
        )
    return highest


def parse_request(request: cni_pb2.CallRequest) -> Call:
    """The call in the request. Raises a CniError that names what is wrong."""
    return cni.parse(
        command=request.command,
        container_id=request.container_id,
        netns=request.netns,
        ifname=request.ifname,
        args=request.args,
        stdin=request.stdin,
        issued_ns=request.issued_at,
    )
