"""Boots Debian's kernel below build/vm under QEMU's software emulation, with this machine's files, read-only.

A guest is a program of ours that runs as root in it and answers in lines `@name: answer`, the last of them `@end: …`;
the kernel writes to the same console. The processor is emulated, some twenty times slower than the machine's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 1800


def boot(guest: str, memory: str = "1G") -> dict[str, str]:
    """What a guest, a command, answers: name → answer."""
    (kernel,) = (ROOT / "build" / "vm" / "boot").glob("vmlinuz-*")
    tools = Path(sys.executable).parent
    command = [str(tools / "vng"), "--run", str(kernel), "--disable-kvm", "--force-9p", "--user", "root", "--cwd", "/"]
    done = subprocess.run(
        [*command, "--verbose", "--memory", memory, "--cpus", "2", "--exec", guest],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
        env={"PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
    )
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
    found = dict(line[1:].split(": ", 1) for line in said if line.startswith("@") and ": " in line)
    assert "end" in found, f"the guest did not come to its end: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return found
