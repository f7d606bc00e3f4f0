"""Fuzz the intake, guided by coverage, on Linux with the extra `fuzz`: `python tests/fuzz/run.py upload 600`.

600 is seconds of the processor, whatever else the machine does. Inputs that found something new are kept under
runs/fuzz/<target>, and what fails lies beside them as crash-…; the corpus that the tests replay is where it starts.
Further arguments go to libFuzzer: `run.py upload 0 -merge=1 tests/fuzz/corpus/upload runs/fuzz/upload` keeps the fewest
inputs that cover as much.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import atheris

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
with atheris.instrument_imports(include=["deepfusion", "draws", "intake"]):
    import intake
    from deepfusion import adapters, checkpoints, families

# libFuzzer's limits are of wall time and of the whole process; a target itself has much narrower ones.
LIMITS = ("-timeout=1200", "-rss_limit_mb=3072", "-max_len=512", "-len_control=20", "-print_final_stats=1")


def remember() -> None:
    """Make once what follows from a config alone, and is most of the work of every input."""
    made: dict[str, Any] = {}

    def skeleton(config: Any) -> Any:
        known = f"{type(config)} {config.to_json_string(use_diff=False)}"
        if known not in made:
            if len(made) > 99:
                made.clear()
            made[known] = families.skeleton(config)
        return made[known]

    adapters.skeleton = checkpoints.skeleton = skeleton


def main() -> None:
    target, seconds, *options = sys.argv[1:]
    warnings.simplefilter("error")  # as in tests: what libraries warn of is looked at
    logging.disable()
    remember()
    intake.world()  # before the clock of the first input runs
    kept = Path("runs/fuzz") / target
    kept.mkdir(parents=True, exist_ok=True)
    end = time.process_time() + float(seconds)

    def run(data: bytes) -> None:
        intake.TARGETS[target](data)
        if time.process_time() > end and not options:
            os.kill(os.getpid(), signal.SIGUSR1)  # libFuzzer says what it has done, and ends

    folders = [] if options else [str(kept), str(HERE / "corpus" / target)]
    atheris.Setup([sys.argv[0], *LIMITS, f"-artifact_prefix={kept}/", *options, *folders], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
