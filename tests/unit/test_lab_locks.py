"""The lock of a lab, when the `up` that holds it is killed while a command of its is under way."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from podwire.lab import state

UP = """
import sys
from pathlib import Path
from podwire.lab import state, topology

folder = Path(sys.argv[1])
with state.locked(folder / "lock"):
    topology.run(["sh", "-c", "touch begun; sleep 1; touch ended"], mark=sys.argv[2])
"""


def test_a_command_whose_up_was_killed_is_waited_for(tmp_path: Path) -> None:
    up = subprocess.Popen([sys.executable, "-c", UP, str(tmp_path), "lab"], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not (tmp_path / "ended").exists()
    up.kill()
    up.wait()
    with state.locked(tmp_path / "lock"):
        assert (tmp_path / "ended").exists()
    assert state.held() == ()
