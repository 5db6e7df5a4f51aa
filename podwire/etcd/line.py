"""One endpoint: its channel, and the calls on it.

gRPC reconnects a channel by itself, at most once a second; a call meets a channel without connection at once, so a
server that is away costs the caller's own back-off and no loop. Dead peers are found by HTTP/2 pings (10 s + 5 s).

A channel is replaced when the certificate files have changed, and when its server was too slow once (`give_up`): what
waits on the old one then ends, and its callers go to another endpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio

from podwire.config import ConfigError
from podwire.etcd import tls, wire
from podwire.etcd.options import EtcdOptions, parse_endpoint

CONNECT_S = 1.0
_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1000)),  # gRPC takes it as the time to connect, too
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),  # etcd's server refuses less than 5 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),  # a session shares no connection, and no back-off, with another
    ("grpc.enable_http_proxy", 0),
)
_READY = grpc.ChannelConnectivity.READY
_FAILED = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


class Line:
    """A line to one endpoint. Raises ConfigError when a certificate cannot be read."""

    def __init__(self, endpoint: str, options: EtcdOptions) -> None:
        self.endpoint, self._secure = parse_endpoint(endpoint, options.tls)
        self._options = options
        self._closing: set[asyncio.Task[None]] = set()
        self._channel = self._make()
        self.methods: dict[str, Callable[..., Any]] = wire.methods(self._channel)

    async def ready(self, within: float) -> bool:
        """True as soon as there is a connection, False as soon as it is clear that there is none."""
        channel = self._channel
        if self._secure and channel.get_state() is not _READY:
            channel = self._with_new_certificates()
        try:
            async with asyncio.timeout(within):
                while (state := channel.get_state(try_to_connect=True)) is not _READY:
                    if state in _FAILED:
                        return False
                    await channel.wait_for_state_change(state)
        except (TimeoutError, grpc.aio.UsageError):  # the latter: replaced, or closed, meanwhile
            return False
        return True

    async def diagnose(self) -> str:
        """Why there is no connection, if TLS is to blame; else empty."""
        return await tls.diagnose(self.endpoint, self._options) if self._secure else ""

    def give_up(self) -> None:
        """Ends everything that waits on this line; the next that asks for it connects again."""
        self._replace(self._make())

    async def close(self) -> None:
        """Closes the channel for good."""
        await asyncio.gather(self._channel.close(), *self._closing, return_exceptions=True)

    def _make(self) -> Any:
        if not self._secure:
            return grpc.aio.insecure_channel(self.endpoint, _CHANNEL_OPTIONS)
        self._certificates = tls.fingerprint(self._options)
        return grpc.aio.secure_channel(self.endpoint, tls.credentials(self._options), _CHANNEL_OPTIONS)

    def _with_new_certificates(self) -> Any:
        if tls.fingerprint(self._options) != self._certificates:
            with suppress(ConfigError):  # one is just being replaced: the old ones may do, or the next look will
                self._replace(self._make())
        return self._channel

    def _replace(self, channel: Any) -> None:
        old, self._channel = self._channel, channel
        self.methods = wire.methods(channel)
        task = asyncio.create_task(old.close(), name=f"close-{self.endpoint}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
