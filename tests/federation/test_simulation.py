"""The two apps under Flower's simulation engine: fleets of any size in one folder."""

from __future__ import annotations

import json
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

import tiny
from deepfusion import pipeline
from deepfusion.artifacts import file_digest
from deepfusion.config import Recipe, Runtime
from deepfusion.engine import StepError
from deepfusion.errors import InputError
from deepfusion.federation import simulation
from deepfusion.federation.device import DeviceFile
from deepfusion.federation.inbox import Verdict
from deepfusion.federation.project import Project, node_keys
from federation.fleet import Fleet, until

HERE = Runtime(workers=0)
BUDGETED = ("write", "joint", "branch", "tune")  # the phases that take the server's budget
PATIENCE = 3600  # seconds that a busy machine may take for a hundred devices


def tree(devices: int, holders: int = 1) -> dict[str, Any]:
    made = deepcopy(tiny.TREE)
    made["data"]["partition"] = {"devices": devices, "holders": holders}
    made["transfer"]["writers"] = "proxies"
    made["evaluate"] = {"references": []}
    return made


def simulated(root: Path, fields: dict[str, Any]) -> Project:
    """A simulation by its command."""
    recipe = root.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(fields))
    command = ["federation", "simulate", str(recipe), "--out", str(root), "--workers", "2"]
    with Fleet(root.with_suffix(".fleet")) as fleet:
        fleet.start("simulation", ["python", "-m", "deepfusion.cli", *command], root.parent)
        until(lambda: fleet.ended("simulation"), "the simulation ends", PATIENCE)
        assert fleet.running["simulation"].returncode == 0, fleet.log("simulation")
    return Project(root)


def weights(moe: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in moe.glob("*.safetensors")}


def verdicts(project: Project) -> list[Verdict]:
    return [Verdict.model_validate_json(path.read_bytes()) for path in sorted(project.inbox.glob("verdicts/*.json"))]


def compute(project: Project) -> float:
    """FLOPs of the server's budgeted phases."""
    spent = defaultdict[str, float](float)
    for phase in json.loads((project.run / "results.json").read_text())["phases"]:
        spent[phase["name"]] += phase["flops"] or 0.0
    return sum(spent[name] for name in BUDGETED)


def test_every_device_has_its_text_its_key_and_its_ancestor(tmp_path: Path) -> None:
    recipe = Recipe.parse(tree(4))
    project = simulation.enrol(tmp_path / "there", recipe, tree(4), HERE)
    chosen = Recipe.load(project.recipe)
    assert chosen.federation is not None
    names = chosen.federation.devices
    assert names == ("device-00", "device-01", "device-02", "device-03")
    assert chosen.federation.grace_s == chosen.federation.deadline_s  # everyone is waited for
    assert chosen.federation.quorum == chosen.cluster.k  # but not all need to come through
    assert len(node_keys(project.keys, names)) == 4
    read = [DeviceFile.load(project.device(name) / "device.yaml") for name in names]
    texts = [{document.id for document in one.private()} for one in read]
    assert all(texts)
    assert sum(map(len, texts)) == len(set.union(*texts))  # a fact has one holder
    for one in read:
        [(_, copy)] = one.ancestors.items()
        assert (Path(copy) / "model.safetensors").is_file()
    before = {path: path.read_bytes() for path in project.root.glob("keys/*.pub")}
    simulation.enrol(project.root, recipe, tree(4), HERE)  # it is gone on with
    assert before == {path: path.read_bytes() for path in project.root.glob("keys/*.pub")}
    with pytest.raises(InputError, match="is of another recipe"):
        simulation.enrol(project.root, Recipe.parse(tree(2)), tree(2), HERE)


def test_who_asks_an_engine_that_has_ended_is_told() -> None:
    grid = simulation.Grid(states(), 1)
    grid.engine.set_exception(RuntimeError("no memory"))
    with pytest.raises(StepError, match="no memory"):
        grid.get_nodes()


def states() -> LinkStateFactory:
    return LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())


@pytest.mark.slow
def test_the_moe_is_that_of_a_run_on_one_machine(tmp_path: Path) -> None:
    pipeline.run(Recipe.parse(tree(4)), tmp_path / "here", Runtime(workers=2))
    project = simulated(tmp_path / "there", tree(4))
    assert weights(project.run / "moe") == weights(tmp_path / "here" / "moe") != {}
    assert [one.state for one in verdicts(project)] == ["accepted"] * 4


@pytest.mark.slow
def test_the_server_does_no_more_for_128_devices_than_for_8(tmp_path: Path) -> None:
    few, many = simulated(tmp_path / "few", tree(8)), simulated(tmp_path / "many", tree(128, holders=16))
    assert [one.state for one in verdicts(many)] == ["accepted"] * 128
    results = json.loads((many.run / "results.json").read_text())
    assert results["rejected"] == []
    assert compute(many) == pytest.approx(compute(few), rel=0.1)
