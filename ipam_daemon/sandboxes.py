"""The pod sandboxes that the container runtime has, over the Container Runtime Interface.

Asked only when somebody says where the runtime is (`podwire ipam check --runtime-endpoint`): a node without a kubelet
has none, and what the daemon does by itself must not hang on it. One call, and one for each ready sandbox that has no
attachment: whether it has a network of its own is in no list.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import grpc
import grpc.aio

from ipam_daemon.facts import Sandbox
from podwire.errors import PodwireError, TryAgain
from podwire.v1 import runtime_pb2

_SECONDS = 20.0
_SERVICE = "/runtime.v1.RuntimeService/"
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))


class RuntimeUnreachable(TryAgain):
    """The container runtime does not answer, or not as documented."""


class EndpointUnusable(PodwireError):
    """What was given is not an endpoint."""


async def list_sandboxes(endpoint: str, attached: Container[str]) -> tuple[Sandbox, ...]:
    """All sandboxes of the runtime at `endpoint`, a path or a URL with the scheme unix. `attached` are the ids of those
    of which it need not be known whether they have a network of their own.

    Raises RuntimeUnreachable, EndpointUnusable. Source: k8s.io/cri-api, runtime.v1.
    """
    path = endpoint.removeprefix("unix://")
    if not path.startswith("/"):
        raise EndpointUnusable(
            f"{endpoint!r} is no endpoint of a runtime: write unix:///run/containerd/containerd.sock"
        )
    async with grpc.aio.insecure_channel(f"unix:{path}", _OPTIONS) as channel:
        try:
            answer = await _call(
                channel, "ListPodSandbox", runtime_pb2.ListPodSandboxRequest(), runtime_pb2.ListPodSandboxResponse
            )
            return tuple([await _sandbox(channel, item, item.id in attached) for item in answer.items])
        except grpc.aio.AioRpcError as error:
            raise RuntimeUnreachable(f"{endpoint}: {error.code().name}: {error.details()}") from error


async def _sandbox(channel: Any, item: runtime_pb2.PodSandbox, attached: bool) -> Sandbox:
    ready = item.state == runtime_pb2.SANDBOX_READY
    return Sandbox(
        id=item.id,
        ready=ready,
        pod=f"{item.metadata.namespace}/{item.metadata.name}",
        own_network=attached or not ready or await _has_own_network(channel, item.id),
    )


async def _has_own_network(channel: Any, sandbox: str) -> bool:
    """False also for one that was removed since it was listed."""
    try:
        answer = await _call(
            channel,
            "PodSandboxStatus",
            runtime_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox),
            runtime_pb2.PodSandboxStatusResponse,
        )
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return False
        raise
    return bool(answer.status.linux.namespaces.options.network != runtime_pb2.NAMESPACE_NODE)


async def _call(channel: Any, method: str, request: Any, response: Any) -> Any:
    invoke = channel.unary_unary(
        _SERVICE + method, request_serializer=type(request).SerializeToString, response_deserializer=response.FromString
    )
    return await invoke(request, timeout=_SECONDS)
