"""One upload of more than 2 GiB over real Flower processes: it arrives bit for bit, and never lies in memory whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "federation_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads memory from /proc")
def test_an_upload_of_more_than_two_gibibytes(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--devices", "1", "--megabytes", "2200", "--piece-bytes", str(2**27)]
    command += ["--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)  # it compares what has come with what was sent itself
    assert found["upload"] > 2**31
    assert found["upload"] < found["messages"]["up"] < 1.01 * found["upload"]
    assert found["messages"]["up"] < found["wire"]["up"] < 1.02 * found["upload"]
    assert found["peak"]["proportional"] < 0.5 * found["upload"] + found["idle"]["proportional"]
