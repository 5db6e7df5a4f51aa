"""Certificates: for gRPC, and in words.

gRPC reads none of them again by itself, so a line notices when a file has changed and makes its channel anew. Nor does
it say what is wrong with one ("Unwrap failed (TSI_DATA_CORRUPTED)" is a client certificate that has expired): when gRPC
has failed to connect, `diagnose` does one handshake with the standard library, which says it in words.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from podwire.config import ConfigError
from podwire.etcd.options import EtcdOptions

_DIAGNOSE_S = 1.0
Fingerprint: TypeAlias = tuple[tuple[int, int, int] | None, ...]


def fingerprint(options: EtcdOptions) -> Fingerprint:
    """Changes when one of the certificate files does."""
    return tuple(_stat(path) for path in (options.ca, options.cert, options.key) if path)


def _stat(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def credentials(options: EtcdOptions) -> Any:
    """gRPC's credentials of the files as they are now. Raises ConfigError naming the file that cannot be read."""

    def pem(path: str) -> bytes | None:
        try:
            return Path(path).read_bytes() if path else None
        except OSError as error:
            raise ConfigError(f"etcd: {path}: cannot be read: {error.strerror}") from error

    return grpc.ssl_channel_credentials(pem(options.ca), pem(options.key), pem(options.cert))


async def diagnose(address: str, options: EtcdOptions) -> str:
    """Why no connection to `address` (host:port) comes about, in words; empty when TLS is not to blame."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        context = ssl.create_default_context(cafile=options.ca or None)
        context.set_alpn_protocols(["h2"])
        if options.cert:
            context.load_cert_chain(options.cert, options.key)
    except (OSError, ssl.SSLError) as error:
        return f"the certificates cannot be used: {_reason(error)} ({options.ca}, {options.cert}, {options.key})"
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(_DIAGNOSE_S):
            reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
            await reader.read(1)  # with TLS 1.3 the server's opinion of our certificate comes after the handshake
    except ssl.SSLCertVerificationError as error:
        return f"etcd's certificate is not accepted: {error.verify_message.rstrip('.')} (ca: {options.ca or 'system'})"
    except ssl.SSLError as error:
        return (
            f"the TLS handshake fails: {_reason(error)} (our certificate: {options.cert or 'none'}; etcd says no more "
            f"when it is missing, has expired, or is signed by a CA that etcd does not trust)"
        )
    except (OSError, TimeoutError):
        return ""
    finally:
        if writer is not None:
            writer.transport.abort()
    return ""


def _reason(error: OSError) -> str:
    return (getattr(error, "reason", None) or error.strerror or str(error)).replace("_", " ").lower()
