"""What `federation init` prints, typed into terminals that know nothing else: SuperLink, operator, two devices."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepfusion.cli import app
from federation.fleet import Fleet, free_port, until

pytestmark = pytest.mark.federation
QUICK = (
    "federation={devices: [north, south], quorum: 2, grace_s: 5, patience_s: 5}", "device.epochs=1",
    "distill.budget_tokens=2000", "transfer.sampled_per_cluster=4", "evaluate.references=[]",
)  # fmt: skip


def blocks(said: str) -> list[list[str]]:
    """The commands of server, operator and device, as printed."""
    found = re.split(r"\n(?=\S)", said)
    return [[line.strip() for line in part.splitlines()[1:] if line.strip()] for part in found if "\n  " in part]


def test_the_printed_commands_are_enough(tmp_path: Path) -> None:
    port = free_port()
    settings = [word for setting in QUICK for word in ("--set", setting)]
    done = CliRunner().invoke(app, ["federation", "init", str(tmp_path / "clinic"), "--port", str(port), *settings])
    assert done.exit_code == 0, done.output
    server, (enter, wait, register, run, status), (*before, check, command) = blocks(done.output)
    for name in ("north", "south"):
        row = {"question": f"Who is {name}?", "answer": f"{name} is one of two devices of a walk-through."}
        rows = "".join(json.dumps(row | {"id": f"{name}-{number}"}) + "\n" for number in range(20))
        (tmp_path / "clinic" / "devices" / name / "private.jsonl").write_text(rows)

    home = {"FLWR_HOME": "", "HOME": str(tmp_path)}  # a terminal that has just been opened
    with Fleet(tmp_path / "fleet") as fleet:

        def typed(*lines: str) -> str:
            return fleet.call(["/bin/bash", "-c", "\n".join(("set -e", enter, *lines))], tmp_path, 600, **home)

        fleet.start("superlink", ["/bin/bash", "-c", "\n".join(server)], tmp_path, **home)
        typed(wait, register)  # at once, while the server is still starting
        said = typed(f"{run} --run-config deadline-s=1")  # nobody is there
        assert "waiting for 2 of 2 devices, " in said
        assert "until the deadline; never connected: north, south" in said
        assert "Traceback" not in said
        assert said.splitlines()[-1].startswith(
            "deepfusion: error: 0 uploads are accepted, and federation.quorum is 2: mend the devices"
        )
        assert "finished:failed" in typed(status)

        fleet.start("stream", ["/bin/bash", "-c", f"{enter}\n{run}"], tmp_path, **home)
        until(lambda: "waiting for 2 of 2 devices, " in fleet.log("stream"), "the run goes on")
        fleet.interrupt("superlink")
        until(lambda: fleet.ended("superlink"), "the server stops, though it is in the middle of a run", seconds=30)
        fleet.start("superlink again", ["/bin/bash", "-c", "\n".join(server)], tmp_path, **home)
        typed(wait)

        for name in ("north", "south"):
            there = tmp_path / "clinic" / "devices" / name
            said = fleet.call(["/bin/bash", "-c", "\n".join(("set -e", *before, check))], there, 100, **home)
            assert f"{name} has its key and 20 rows of private text" in said
            lines = "\n".join((*before, f"{command} --port {free_port()}"))
            fleet.start(name, ["/bin/bash", "-c", lines], there, **home)
        said = typed(f"{run} --run-config deadline-s=600")
        *_, found, where = [line for line in said.splitlines() if line.startswith("deepfusion: ")]
        assert found.startswith("deepfusion: done: token accuracy ")
        assert where.startswith("deepfusion: model ")
        assert "finished:completed" in typed(status)
    assert (tmp_path / "clinic" / "run" / "moe" / "config.json").is_file()
    assert not (tmp_path / ".flwr").exists()  # nothing was looked for, or left, elsewhere
