"""What stands beside a run, in whole runs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepfusion import pipeline
from deepfusion.artifacts import RECORD
from deepfusion.labels import BESIDE
from deepfusion.phases.consult import likeliest
from deepfusion.signals import Signals
from deepfusion.weights import tensors
from seen import Seen
from tiny import HERE, recipe

BASELINES = (
    "evaluate.references=[ofa_kd, fedmkt, fedjets, fedavg_dense, btx]",
    "baselines={fedavg_dense: {rounds: 2}, fedjets: {rounds: 2}, ofa_kd: {stages: 1}}",
)
# Hand-made models, nothing of the run's own training: it is not what is tested here.
BARE = ("distill.budget_tokens=3000", "transfer.sampled_per_cluster=4")


def step(out: Path, phase: str, item: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A step's weights, and what it says of itself."""
    [folder] = out.glob(f"steps/{phase}/{item}-*")
    inner = folder / "model" if (folder / "model").is_dir() else folder
    return dict(tensors(inner)), step_record(out, phase, item)


def step_record(out: Path, phase: str, item: str) -> dict[str, Any]:
    """What a step says of itself."""
    [folder] = out.glob(f"steps/{phase}/{item}-*")
    return json.loads((folder / RECORD).read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Seen]:
    """One run of the baselines, whose devices send adapters."""
    out, seen = tmp_path_factory.mktemp("runs") / "tiny", Seen()
    pipeline.run(recipe(*BASELINES, *BARE, "device.method=lora", "device.upload=adapter"), out, HERE, seen)
    return out, json.loads((out / "results.json").read_text()), seen


def test_baselines_are_measured_beside_the_run(done: tuple[Path, dict[str, Any], Seen]) -> None:
    _, found, seen = done
    assert {"ofa_kd", "fedmkt", "fedjets", "fedavg_dense", "btx"} <= {row["system"] for row in found["rows"]}
    ran = Counter(name.split()[0] for name in seen.ran)
    assert (ran["fedavg_device"], ran["fedavg_round"], ran["btx_device"], ran["btx_branch"]) == (8, 2, 4, 2)
    sides = {phase["name"]: phase["side"] for phase in found["phases"]}
    assert {sides[name] for name in (*BESIDE & sides.keys(), "fedavg_dense", "btx")} == {"reference"}
    assert {"btx", "ofa_kd", "fedmkt", "fedjets"} <= found["routing"].keys()


@pytest.mark.parametrize(("name", "short"), [("ofa_kd", "ofa"), ("fedmkt", "fedmkt")])
def test_another_objective_changes_nothing_else(name: str, short: str, done: tuple[Path, dict[str, Any], Seen]) -> None:
    out, found, _ = done
    for phase, items in {"joint": ["joint"], "branch": ["cluster-0", "cluster-1"], "tune": ["tune"]}.items():
        for item in items:
            theirs = f"{short}_{phase}"
            ours, other = step(out, phase, item)[0], step(out, theirs, item.replace(phase, theirs))[0]
            assert ours.keys() == other.keys()  # exits are thrown away
            assert any(not torch.equal(tensor, other[weight]) for weight, tensor in ours.items())
    spent: dict[str, Counter[str]] = {"deepfusion": Counter(), name: Counter()}
    for part in found["compute"]:
        if part["system"] in spent:
            spent[part["system"]]["tune" if part["part"] == "train" else str(part["part"])] += part["token_parameters"]
    asking = spent[name].pop("consult", 0)
    assert spent["deepfusion"] == spent[name]
    assert set(spent[name]) == {"write", "joint", "branch", "router", "tune"}
    assert (asking > 0) == (name == "fedmkt")


def test_of_all_that_write_the_likeliest_teaches(done: tuple[Path, dict[str, Any], Seen]) -> None:
    """Each device and the student say how likely they find each document; no document has two teachers."""
    out, found, _ = done
    devices = [f"device-0{n}" for n in range(4)]
    nats = {one: step_record(out, "fedmkt_likelihoods", one)["nats"] for one in (*devices, "student")}
    expected = likeliest({one: nats[one] for one in devices}, nats["student"])
    assert expected
    for one in devices:
        [folder] = out.glob(f"steps/fedmkt_consult/{one}-*")
        assert set(Signals.load(folder / "signals.safetensors").of) == {d for d, who in expected.items() if who == one}
    [asked] = [p["token_parameters"] for p in found["compute"] if (p["system"], p["part"]) == ("fedmkt", "consult")]
    consulted = sum(step_record(out, "fedmkt_consult", one)["work"]["forward"] for one in devices)
    heard = sum(step_record(out, "fedmkt_likelihoods", one)["work"]["forward"] for one in nats)
    assert asked == pytest.approx(consulted)
    assert consulted > heard  # which is part of it


def test_a_run_too_can_be_taught_by_the_likeliest(tmp_path: Path) -> None:
    """Then it is what the baseline is, but for the objective; and controls may train for what it took."""
    settings = (
        *BARE,
        "distill.teachers=likeliest",
        "evaluate.references=[pooled_text_dense]",
        "distill.shares.joint=1",
    )
    shares = ("distill.shares.branch=0", "distill.shares.tune=0")
    out, seen = tmp_path / "run", Seen()
    pipeline.run(recipe(*settings, *shares), out, HERE, seen)
    ran = Counter(name.split()[0] for name in seen.ran)
    assert (ran["likelihoods"], ran["consult"], ran["joint"]) == (5, 4, 1)
    spent = {
        (p["system"], p["part"]): p["token_parameters"]
        for p in json.loads((out / "results.json").read_text())["compute"]
    }
    budget = spent["deepfusion", "joint"] + spent["deepfusion", "consult"]
    assert spent["pooled_text_dense", "train"] == pytest.approx(budget, rel=0.1)


def test_baselines_send_what_the_run_sends(tmp_path: Path) -> None:
    """With a codec, what devices make of a whole model is packed too; parts of an MoE are not.

    And of the steps that a device takes at least, a round has its share.
    """
    out = tmp_path / "run"
    chosen = recipe(
        "evaluate.references=[fedavg_dense, fedjets]", "baselines={fedavg_dense: {rounds: 2}, fedjets: {rounds: 1}}",
        "device.codec={numbers: int8, delta: true}", "device.epochs=0.1", "device.min_steps=4",
        "transfer.kinds=[public]", *BARE[:1],
    )  # fmt: skip
    pipeline.run(chosen, out, HERE)
    size = chosen.device.training.rows * chosen.device.training.context
    for phase, item, steps in (
        ("device", "device-00", 4),
        ("fedavg_device", "round-2-device-00", 2),
        ("fedjets_device", "round-1-device-00", 4),
    ):
        assert steps * size <= step_record(out, phase, item)["work"]["tokens"] < (steps + 1) * size
    found = json.loads((out / "results.json").read_text())["bytes"]["baselines"]
    packed = [step_record(out, "fedavg_device", f"round-1-device-0{n}") for n in range(4)]
    assert {record["packing"]["codec"] for record in packed} == {"int8 delta"}
    second, _ = step(out, "fedavg_materialise", "round-2-device-00")
    mean, _ = step(out, "fedavg_round", "1")
    assert second.keys() == mean.keys()
    assert all(0 < float((second[name] - mean[name]).norm() / mean[name].norm()) < 0.5 for name in mean)
    assert found["fedavg_dense"]["up"] * 2 < found["fedavg_dense"]["down"]
    assert "packing" not in step_record(out, "fedjets_device", "round-1-device-00")


def test_a_round_starts_from_the_mean_of_the_last(done: tuple[Path, dict[str, Any], Seen]) -> None:
    out = done[0]
    first, told = step(out, "fedavg_round", "1")
    models, records = zip(*(step(out, "fedavg_materialise", f"round-1-device-0{n}") for n in range(4)), strict=True)
    counts = [record["tokens"] for record in records]
    assert len(set(counts)) > 1
    for name, tensor in first.items():
        mean = sum(count / sum(counts) * model[name] for count, model in zip(counts, models, strict=True))
        torch.testing.assert_close(tensor, mean)
    # What a device changes is the product of two matrices of rank 8 at most: from the mean, and from nothing else.
    second, _ = step(out, "fedavg_materialise", "round-2-device-00")
    name = next(name for name in second if name.endswith("down_proj.weight"))
    assert torch.linalg.matrix_rank(second[name] - first[name], rtol=1e-3) <= 8 < min(second[name].shape)
    assert told["number"] == 1


def test_what_goes_over_the_wire_is_counted(done: tuple[Path, dict[str, Any], Seen]) -> None:
    """A model down, an adapter up: for each of four devices, in each round."""
    out, found, _ = done
    up = sum(step(out, "fedavg_materialise", f"round-1-device-0{n}")[1]["bytes"] for n in range(4))
    rounds = found["bytes"]["baselines"]["fedavg_dense"]["rounds"]
    assert found["bytes"]["baselines"]["fedavg_dense"]["up"] == pytest.approx(up * rounds, rel=0.01)
    assert found["bytes"]["baselines"]["btx"]["up"] == pytest.approx(up, rel=0.01)
    assert found["bytes"]["baselines"]["btx"]["rounds"] == 1
    size = sum(file.stat().st_size for file in next(out.glob("steps/make/base-*")).iterdir() if file.name != RECORD)
    assert found["bytes"]["baselines"]["btx"]["down"] == pytest.approx(4 * size, rel=0.1)


def test_parts_of_an_moe_go_round(done: tuple[Path, dict[str, Any], Seen]) -> None:
    """Two rounds of four devices with an anchor in each cluster; then tuned, and the better by held-out text stays."""
    out, found, _ = done
    told = [step_record(out, "fedjets_device", f"round-{n}-device-0{device}") for n in (1, 2) for device in range(4)]
    assert {tuple(one["experts"]) for one in told} == {(0, 1)}  # of two clusters, both
    assert {one["owner"] for one in told[:4]} == {one["owner"] for one in told[4:]} == {0, 1, None}
    traffic = found["bytes"]["baselines"]["fedjets"]
    base = sum(file.stat().st_size for file in next(out.glob("steps/make/base-*")).iterdir() if file.name != RECORD)
    sent = sum(one["down_bytes"] for one in told[: 4 * traffic["rounds"]])
    assert traffic["up"] == sum(one["bytes"] for one in told[: 4 * traffic["rounds"]])
    assert traffic["down"] == pytest.approx(sent + 4 * base, rel=0.01)
    first, _ = step(out, "fedjets_start", "fedjets_start")
    last, _ = step(out, "fedjets_round", "2")
    assert first.keys() == last.keys()
    judged = step_record(out, "fedjets", "fedjets")
    kept, tuned = (step_record(out, name, name) for name in ("fedjets_best", "fedjets_tune"))
    losses = [loss for _, loss in judged["heldout"]]
    assert [number for number, _ in judged["heldout"]] == [kept["number"], tuned["number"]]
    assert judged["work"] == (kept if losses[0] <= losses[1] else tuned)["work"]
    if judged["work"]["tokens"]:
        [spent] = [p for p in found["compute"] if p["system"] == "fedjets"]
        assert spent["part"] == "train"


def test_experts_are_what_clusters_made_of_the_base(done: tuple[Path, dict[str, Any], Seen]) -> None:
    out, found, _ = done
    moe, _ = step(out, "btx_merge", "btx_merge")
    experts = [moe[f"model.layers.0.block_sparse_moe.experts.{n}.w2.weight"] for n in range(2)]
    for cluster, expert in enumerate(experts):
        branch, _ = step(out, "btx_branch", f"cluster-{cluster}")
        assert torch.equal(expert, branch["model.layers.0.mlp.down_proj.weight"])
    assert not torch.equal(*experts)
    spent = {part["part"]: part["token_parameters"] for part in found["compute"] if part["system"] == "btx"}
    budget = 3 * 3000 * step(out, "make", "base")[1]["active_parameters"]
    batch = 3 * 4 * 96 * step(out, "btx_merge", "btx_merge")[1]["active_parameters"]
    assert set(spent) == {"write", "router", "train"}
    assert budget <= spent["router"] + spent["train"] < budget + batch


def test_a_plan_counts_what_devices_train_for_baselines(tmp_path: Path) -> None:
    planned = {one.phase: one.count for one in pipeline.plan(recipe(*BASELINES), tmp_path / "run")}
    assert (planned["fedavg_device"], planned["fedavg_round"], planned["fedavg_dense"]) == (8, 2, 1)
    assert (planned["ofa_joint"], planned["ofa_branch"], planned["ofa_assemble"], planned["ofa_tune"]) == (1, 2, 1, 1)
    assert "ofa_own_vector" not in planned
    assert [planned[f"fedmkt_{phase}"] for phase in ("likelihoods", "consult", "joint", "tune")] == [5, 4, 1, 1]
    assert (planned["fedjets_device"], planned["fedjets_round"], planned["fedjets_tune"], planned["fedjets"]) == (
        8,
        2,
        1,
        1,
    )
    assert (planned["btx_device"], planned["btx_branch"], planned["btx_merge"], planned["btx"]) == (4, 2, 1, 1)
    assert "fedavg_materialise" not in planned
    adapters = {one.phase for one in pipeline.plan(recipe(*BASELINES, "device.method=lora", "device.upload=adapter"))}
    assert {"fedavg_materialise", "btx_materialise"} <= adapters
