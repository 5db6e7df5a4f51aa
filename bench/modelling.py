"""What the proxy makes of EndpointSlices before anything goes to the kernel, timed in a process of its own.

    python -m bench.modelling COUNT

COUNT slices of three endpoints, each of a Service of its own, come as the bytes of a streamed list; they are decoded,
and modelled up to what a renderer is given. Answers with a line of JSON, in seconds.
"""

from __future__ import annotations

import json
import sys
import time

import msgspec

from bench.objects import node, service, slices
from kube_proxy_lite.main import spare_collector
from kube_proxy_lite.model import Settings
from kube_proxy_lite.services import Services
from podwire.kube.follower import Follower
from podwire.kube.kinds import proxied_endpoint_slices
from podwire.kube.objects import Node, Service

_PIECE = 1 << 20


def _main(count: int) -> None:
    spare_collector()
    services = Services(Settings(node="bench"))
    services.set_node(msgspec.convert(node("bench"), Node))
    for number in range(count):
        services.set_service(msgspec.convert(service(number), Service))
    lines = [
        b'{"type":"ADDED","object":%b}\n' % msgspec.json.encode(each)
        for number in range(count)
        for each in slices(number, range(3 * number, 3 * number + 3))
    ]
    encoded = b"".join(lines)
    follower = Follower(proxied_endpoint_slices())
    follower.begin()
    began = time.perf_counter()
    decoding = 0.0
    for start in range(0, len(encoded), _PIECE):
        before = time.perf_counter()
        batch = follower.feed(encoded[start : start + _PIECE])
        decoding += time.perf_counter() - before
        for each in batch.upserts if batch else ():
            services.set_slice(each)
    plans = services.changed()
    took = time.perf_counter() - began
    if len(plans) != count:
        raise SystemExit(f"{len(plans)} plans of {count} Services")
    print(json.dumps({"seconds": took, "decoding": decoding, "bytes": len(encoded)}))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
