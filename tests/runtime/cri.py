"""A client of the Container Runtime Interface: what a kubelet is to a runtime.

Requests and answers are plain dicts in protobuf's JSON names, so there is no generated code: protoc describes
`cri.proto` to this process (10 ms, once), and messages are made from the description. The runtime on the other side has
the whole interface, so a wrong field number here is a failed test, not a wrong assumption.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import grpc
import msgspec
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_tools import protoc

_PROTO = Path(__file__).with_name("cri.proto")
_SECONDS = 120.0
Object = dict[str, Any]


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """A pod sandbox as the runtime tells of it. `netns` is the path that the runtime gave the CNI plugin."""

    id: str
    ready: bool
    address: str
    pid: int
    netns: str

    @property
    def process_netns(self) -> Path:
        """Its network namespace as seen from every mount namespace; for as long as its process lives."""
        return Path(f"/proc/{self.pid}/ns/net")


class Cri:
    """A connection to the runtime behind a unix socket. Calls raise grpc.RpcError with the runtime's own words."""

    def __init__(self, socket: Path) -> None:
        # A pool of its own: else it is shared with every channel to this address, dead ones after a restart included.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=options)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def call(self, method: str, service: str = "RuntimeService", **request: Any) -> Object:
        """One call; the answer with all its scalar fields."""
        method_of = _descriptions().FindServiceByName(f"runtime.v1.{service}").FindMethodByName(method)
        send, receive = (
            message_factory.GetMessageClass(kind) for kind in (method_of.input_type, method_of.output_type)
        )
        invoke = self._channel.unary_unary(
            f"/runtime.v1.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=receive.FromString,
        )
        answer = invoke(json_format.ParseDict(request, send()), timeout=_SECONDS, wait_for_ready=True)
        return json_format.MessageToDict(answer, always_print_fields_with_no_presence=True)

    def run(self, pod: str, *, namespace: str, uid: str, cgroup_parent: str) -> str:
        """Runs a sandbox for the pod and returns its id."""
        metadata = {"name": pod, "namespace": namespace, "uid": uid}
        config = {"metadata": metadata, "hostname": pod, "linux": {"cgroupParent": cgroup_parent}}
        return str(self.call("RunPodSandbox", config=config)["podSandboxId"])

    def stop(self, sandbox: str) -> None:
        """Stops it, network included. What is stopped already stays so."""
        self.call("StopPodSandbox", podSandboxId=sandbox)

    def remove(self, sandbox: str) -> None:
        """Removes it and all that the runtime knows of it."""
        self.call("RemovePodSandbox", podSandboxId=sandbox)

    def sandboxes(self) -> list[str]:
        """The ids of all sandboxes, running or not."""
        return [str(item["id"]) for item in self.call("ListPodSandbox")["items"]]

    def inspect(self, sandbox: str) -> Sandbox:
        """All that a test asks about a sandbox."""
        answer = self.call("PodSandboxStatus", podSandboxId=sandbox, verbose=True)
        status, info = answer["status"], json.loads(answer["info"]["info"])
        namespaces = {one["type"]: one.get("path", "") for one in info["runtimeSpec"]["linux"]["namespaces"]}
        return Sandbox(
            id=status["id"],
            ready=status["state"] == "SANDBOX_READY",
            address=status["network"]["ip"],
            pid=int(info.get("pid", 0)),
            netns=namespaces["network"],
        )

    def conditions(self) -> dict[str, bool]:
        """Whether the runtime is ready, and whether it takes its network for ready."""
        return {str(one["type"]): bool(one["status"]) for one in self.call("Status")["status"]["conditions"]}

    def has_image(self, reference: str) -> bool:
        """Whether a sandbox could be run of this image."""
        return "image" in self.call("ImageStatus", "ImageService", image={"image": reference})


@functools.cache
def _descriptions() -> descriptor_pool.DescriptorPool:
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder) / "cri.binpb"
        if protoc.main(["protoc", f"-I{_PROTO.parent}", f"--descriptor_set_out={described}", _PROTO.name]):
            raise RuntimeError(f"{_PROTO} cannot be compiled")
        files = descriptor_pb2.FileDescriptorSet.FromString(described.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool
