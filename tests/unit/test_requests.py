"""The executable's request: the API versions that both sides know, and the call in it."""

from __future__ import annotations

import pytest

from ipam_daemon.errors import InvalidEnvironment, TryAgainLater
from ipam_daemon.model import AttachmentKey
from ipam_daemon.requests import negotiate, parse_request
from podwire.v1.cni_pb2 import CallRequest

RANGES = {
    "the same": ((1, 1), 1),
    "a newer executable that still speaks ours": ((1, 9), 1),
    "a newer executable that does not": ((2, 9), None),
    "an executable that says nothing": ((0, 0), None),
    "an older executable that does not know ours": ((0, 0), None),
    "a range that is none": ((2, 1), None),
}


@pytest.mark.parametrize(("offered", "expected"), RANGES.values(), ids=RANGES.keys())
def test_the_highest_version_that_both_know(offered: tuple[int, int], expected: int | None) -> None:
    request = CallRequest(api_min=offered[0], api_max=offered[1])
    if expected is None:
        with pytest.raises(TryAgainLater, match=f"API {offered[0]} to {offered[1]}"):
            negotiate(request)
    else:
        assert negotiate(request) == expected


def test_every_field_arrives() -> None:
    call = parse_request(
        CallRequest(
            api_min=1,
            api_max=1,
            command="ADD",
            container_id="c1",
            netns="/run/netns/c1",
            ifname="eth0",
            args="K8S_POD_NAME=web",
            path="/opt/cni/bin",
            stdin=b'{"name": "podnet", "cniVersion": "1.0.0"}',
            issued_at=7,
        )
    )
    assert call.key == AttachmentKey("podnet", "c1", "eth0")
    assert (call.command, call.netns, call.pod.name, call.issued_ns) == ("ADD", "/run/netns/c1", "web", 7)


def test_a_request_without_anything_is_refused() -> None:
    with pytest.raises(InvalidEnvironment, match="CNI_COMMAND"):
        parse_request(CallRequest())
