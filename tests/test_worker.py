import subprocess
import sys
from pathlib import Path

import pytest

# A tensor's pages that are given back are cleared again for the next one: a fault for every 4 KiB of it.
FAULTS = """
import resource, torch
from deepfusion.worker import keep_freed_memory
{kept}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(kept: str) -> int:
    """Page faults of making a large tensor twenty times, in a process of its own."""
    ran = subprocess.run([sys.executable, "-c", FAULTS.format(kept=kept)], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the allocator is told on Linux alone")
def test_freed_memory_is_kept() -> None:
    assert faults("keep_freed_memory()") < 2_000 < faults("")
