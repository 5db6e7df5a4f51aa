"""A container image made from Debian's busybox-static, as an archive that `ctr image import` takes.

Source: the Docker image specification v1.2, "Combined Image JSON + Filesystem Changeset Format".
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping
from pathlib import Path

REFERENCE = "podwire.test/busybox:1"
"""A container that runs what it is told to, or nothing for ever: so it is a sandbox's pause image, too."""
_BUSYBOX = Path("/bin/busybox")
_APPLETS = ("cat", "ip", "ping", "sh", "sleep", "wget")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_FOREVER = 2**31 - 1


def write_image(path: Path, environment: Mapping[str, str]) -> None:
    """Writes the archive to `path`; 2 MB, one layer, tagged REFERENCE. Its containers have the environment."""
    layer = _layer()
    variables = {"PATH": "/bin", **environment}
    config = {
        "architecture": _ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {
            "Cmd": ["/bin/sleep", str(_FOREVER)],
            "Env": [f"{name}={value}" for name, value in variables.items()],
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [REFERENCE], "Layers": ["layer.tar"]}]
    files = {
        "config.json": json.dumps(config).encode(),
        "layer.tar": layer,
        "manifest.json": json.dumps(manifest).encode(),
    }
    path.write_bytes(_archive(files))


def _layer() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("bin", "dev", "etc", "proc", "sys", "tmp"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(folder)
        _add(archive, "bin/busybox", _BUSYBOX.read_bytes(), 0o755)
        for applet in _APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    return buffer.getvalue()


def _archive(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            _add(archive, name, data, 0o644)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))
