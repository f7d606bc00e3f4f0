import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepfusion import adapters, pipeline, precision
from deepfusion.artifacts import MANIFEST, Report, Upload
from deepfusion.config import LoRA, Runtime
from deepfusion.errors import InputError
from deepfusion.labels import BASELINES, BESIDE
from deepfusion.phases import device
from deepfusion.weights import WEIGHTS, Part, tensors, write
from seen import Seen
from tiny import HERE, recipe

SYSTEMS = {
    "base", "device", "device_ensemble", "proxy", "proxy_ensemble", "joint_student", "branch", "branch_ensemble",
    "merged", "deepfusion", "pooled_text", "pooled_text_dense", "dense_kd", "centralized",
}  # fmt: skip
DEVICES = [f"device-0{n}" for n in range(4)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, Seen]:
    """One run of everything."""
    out, seen = tmp_path_factory.mktemp("runs") / "tiny", Seen()
    return out, pipeline.run(recipe(), out, HERE, seen), seen


@pytest.fixture
def again(done: tuple[Path, Report, Seen], tmp_path: Path) -> Callable[..., tuple[Path, Seen]]:
    """Run a changed recipe in a copy of the finished run's folder."""

    def run(*overrides: str, without: str = "nothing") -> tuple[Path, Seen]:
        out, seen = tmp_path / "run", Seen()
        shutil.copytree(done[0], out, dirs_exist_ok=True)
        for folder in out.glob(f"steps/*/{without}-*"):
            shutil.rmtree(folder)
        pipeline.run(recipe(*overrides), out, HERE, seen)
        return out, seen

    return run


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def step_folders(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("steps/*/*"))


# ── one run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_results_follow_their_schema(done: tuple[Path, Report, Seen]) -> None:
    found = results(done[0])
    assert (found["schema"], found["run"], found["seed"], found["rejected"]) == (1, "tiny", 0, [])
    assert len(found["recipe_digest"]) == 64
    assert {"python", "torch", "transformers", "deepfusion"} <= set(found["versions"])
    rows = found["rows"]
    assert {row["system"] for row in rows} == SYSTEMS
    assert {row["subset"] for row in rows} == {"all", "private_only", "public"}
    assert {"token_log_perplexity", "token_accuracy", "choice_accuracy"} <= {row["metric"] for row in rows}
    assert {row["item"] for row in rows if row["system"] == "device"} == set(DEVICES)
    for row in rows:
        assert set(row) == {"system", "domain", "subset", "metric", "value", "count", "seed", "item"}
        assert isinstance(row["value"], float)
        assert row["count"] > 0
    assert set(found["bytes"]["per_device"]) == set(DEVICES)
    assert found["bytes"]["up"] == sum(device["up"] for device in found["bytes"]["per_device"].values()) > 0
    assert set(found["memory"]["device_peak_bytes"]) == set(DEVICES)
    assert found["memory"]["server_peak_bytes"] > 0
    for step in found["phases"]:
        assert {"name", "item", "seconds", "cpu_seconds", "cached", "tokens", "flops"} <= set(step)
    unwanted = {
        "public",
        "take",
        "materialise",
        "read",
        "agree",
        "shift",
        "mix",
        "task_vectors",
        "own_vector",
        "likelihoods",
        "consult",
        "report",
    }
    unwanted |= (BESIDE | BASELINES.keys() | {"judge"}) - {"upcycle"}
    assert set(pipeline.STEPS) > BESIDE
    assert {step["name"] for step in found["phases"]} == set(pipeline.STEPS) - unwanted


def test_every_system_costs_what_it_may(done: tuple[Path, Report, Seen]) -> None:
    """References train for as much as the run does, to a batch of each of its stages."""
    parts: dict[str, float] = {}
    for part in results(done[0])["compute"]:
        if part["part"] != "write":
            parts[part["system"]] = parts.get(part["system"], 0) + part["token_parameters"]
    for name in ("pooled_text", "pooled_text_dense", "dense_kd"):
        assert parts[name] == pytest.approx(parts["deepfusion"], rel=0.25)


def test_the_result_is_an_ordinary_checkpoint(done: tuple[Path, Report, Seen]) -> None:
    out, report, _ = done
    model = AutoModelForCausalLM.from_pretrained(out / "moe", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(out / "moe", local_files_only=True)
    assert type(model).__module__.startswith("transformers.models.mixtral")
    ids = tokenizer("The", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > ids["input_ids"].shape[1]
    assert not [path for path in (out / "moe").iterdir() if path.name in ("record.json", MANIFEST)]
    assert (out / "moe" / "README.md").read_text() == (report.folder / "README.md").read_text()
    assert (out / "report.html").read_bytes() == report.page.read_bytes()
    assert not list(out.glob(".*.partial"))


def test_a_second_run_runs_nothing(done: tuple[Path, Report, Seen], again: Callable[..., tuple[Path, Seen]]) -> None:
    out, seen = again()
    assert seen.ran == []
    assert sorted(seen.found) == sorted(done[2].ran)
    for name in ("results.json", "report.html", "moe/" + WEIGHTS):
        assert (out / name).read_bytes() == (done[0] / name).read_bytes()
    shutil.rmtree(out / "moe")
    seen = Seen()
    pipeline.run(recipe(), out, Runtime(workers=0, threads=2), seen)
    assert seen.ran == []
    assert (out / "moe" / WEIGHTS).read_bytes() == (done[0] / "moe" / WEIGHTS).read_bytes()


def test_a_change_runs_what_depends_on_it(again: Callable[..., tuple[Path, Seen]]) -> None:
    assert sorted(again("tune.ownership=0.5")[1].ran) == ["evaluate deepfusion", "report", "tune"]


def test_a_harmed_step_is_run_again_and_nothing_else(again: Callable[..., tuple[Path, Seen]]) -> None:
    """It comes out as it was, so what depends on it is still right."""
    ran = again(without="cluster-1")[1].ran
    assert [name for name in ran if not name.startswith("proxy")] == ["write cluster-1", "branch cluster-1"]


def test_a_plan_tells_what_a_run_would_do(done: tuple[Path, Report, Seen], tmp_path: Path) -> None:
    fresh = pipeline.plan(recipe(), tmp_path / "none")
    assert [(step.phase, step.state) for step in fresh[:4]] == [("data", "run"), *[("make", "wait")] * 3]
    assert {step.state for step in fresh[4:]} == {"wait"}
    assert not (tmp_path / "none").exists()
    ran = Counter(step["name"] for step in results(done[0])["phases"])
    for phase, steps in ran.items():
        planned = sum(step.count for step in fresh if step.phase == phase)
        at_least = any(step.phase == phase and step.reason.startswith("at least") for step in fresh)
        assert planned <= steps if at_least else planned == steps, phase
    assert {step.phase for step in fresh} == {*ran, "report"}
    assert {step.state for step in pipeline.plan(recipe(), done[0])} == {"done"}
    changed = pipeline.plan(recipe("tune.ownership=0.5"), done[0])
    assert {step.phase for step in changed if step.state == "run"} == {"tune"}
    assert {(s.phase, s.item) for s in changed if s.state == "wait"} == {("evaluate", "deepfusion"), ("report", None)}


def test_what_stands_beside_a_run_changes_nothing_else(done: tuple[Path, Report, Seen]) -> None:
    changed = pipeline.plan(recipe("evaluate.references=[centralized, btx]"), done[0])
    assert {step.phase for step in changed if step.state == "run"} == {"btx_device"}
    changed = pipeline.plan(recipe("evaluate.removal=false"), done[0])
    assert {step.phase for step in changed if step.state != "done"} == {"evaluate", "report"}


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="run is in use by another run"):
        pipeline.run(recipe(), tmp_path / "run", HERE)


# ── devices that fail ─────────────────────────────────────────────────────────────────────────────────────────────────


def left_out(out: Path, seen: Seen) -> str:
    """Why device-02 was left out; everything else went on without it."""
    found = results(out)
    assert {row["system"] for row in found["rows"]} == SYSTEMS
    assert {row["item"] for row in found["rows"] if row["system"] == "device"} == set(DEVICES) - {"device-02"}
    [rejected] = found["rejected"]
    assert rejected["device"] == "device-02"
    assert str(out) not in json.dumps(found)
    assert "device-02" in (out / "report.html").read_text()
    return rejected["reason"]


def test_a_device_that_breaks_is_left_out_by_name(
    again: Callable[..., tuple[Path, Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> Upload:
        raise RuntimeError("battery empty")

    monkeypatch.setattr(device, "train_device", broken)
    out, seen = again(without="device-02")
    assert left_out(out, seen) == "device device-02 never arrived: device device-02: RuntimeError: battery empty"
    [said] = [text for text in seen.said if "device-02" in text]
    assert said == "device device-02: RuntimeError: battery empty; the run goes on without it"
    assert len(list(out.glob("steps/device/device-02-*.partial"))) == 1  # to go on from


def test_a_device_with_an_error_of_its_own_is_left_out_by_name(
    again: Callable[..., tuple[Path, Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError, which of the recipe or of the text would stop the run."""

    def broken(*, into: Path, **_: Any) -> Upload:
        raise ValueError(f"{into / 'model'}: shapes (3,) and (4,) do not match")

    monkeypatch.setattr(device, "train_device", broken)
    reason = left_out(*again(without="device-02"))
    assert reason.startswith("device device-02 never arrived: device device-02: device/device-02-")
    assert reason.endswith(".partial/model: shapes (3,) and (4,) do not match")


def test_an_error_in_what_all_devices_share_stops_the_run(
    again: Callable[..., tuple[Path, Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> Upload:
        raise InputError("the answer of document 'x' takes 99 tokens")

    monkeypatch.setattr(device, "train_device", broken)
    with pytest.raises(InputError, match=r"^device device-02: the answer of document 'x' takes 99 tokens$"):
        again(without="device-02")


def test_an_upload_with_nan_is_rejected_by_name(
    again: Callable[..., tuple[Path, Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = device.train_device

    def poisoned(*, runtime: Runtime, **options: Any) -> Upload:
        upload = train(runtime=runtime, **options)
        held = {name: tensor.clone() for name, tensor in tensors(upload.model)}
        name = next(name for name in held if "weight" in name)
        held[name].view(-1)[3] = torch.nan
        write(upload.model, [Part.of(*item) for item in held.items()])
        return upload

    monkeypatch.setattr(device, "train_device", poisoned)
    out, seen = again(without="device-02")
    reason = left_out(out, seen)
    assert reason.startswith("device device-02: its model: tensor ")
    assert reason in seen.said  # not in the report alone
    assert reason.endswith("holds NaN or infinity")


def test_no_device_at_all_is_an_error(again: Callable[..., tuple[Path, Seen]], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> Upload:
        raise RuntimeError("battery empty")

    monkeypatch.setattr(device, "train_device", broken)
    with pytest.raises(ValueError, match="not one upload was accepted: device device-00 never arrived"):
        again(without="device")


# ── other recipes ─────────────────────────────────────────────────────────────────────────────────────────────────────

PAPER = (
    "cluster.mode=by_type", "transfer.kinds=[public]", "distill.teachers=proxies", "distill.objective.kind=vaa",
    "distill.objective.stages=1", "distill.objective.patches=2", "distill.objective.width=8",
    "distill.objective.heads=2", "distill.shares={joint: 0, branch: 0.8, tune: 0.2}", "tune.text=public",
)  # fmt: skip


def test_the_published_method_runs(again: Callable[..., tuple[Path, Seen]]) -> None:
    out, seen = again(*PAPER)
    found = results(out)
    assert {name for name in seen.ran if name.startswith("consult")} == {"consult cluster-0", "consult cluster-1"}
    assert not {name for name in seen.ran + seen.found if name.startswith(("write", "joint"))}
    assert found["transfer"]["private_text_risk"] is False
    assert [len(proxy["members"]) for proxy in found["clusters"]["proxies"]] == [2, 2]
    assert len({proxy["model_type"] for proxy in found["clusters"]["proxies"]}) == 2


def test_teachers_can_be_a_shift_of_the_base(again: Callable[..., tuple[Path, Seen]]) -> None:
    """Only what learns from teachers takes the shifted text, and pays for it out of the same budget."""
    out, seen = again("distill.shifted=true", "evaluate.references=[pooled_text_dense, dense_kd]")
    assert {"shift", "joint", "tune", "dense_kd"} <= set(seen.ran)
    compute = {(part["system"], part["part"]): part["token_parameters"] for part in results(out)["compute"]}
    shifting = compute["deepfusion", "shift"]
    assert shifting > 0
    assert compute["dense_kd", "shift"] == shifting
    assert ("pooled_text_dense", "shift") not in compute
    whole = compute["pooled_text_dense", "train"]
    assert compute["dense_kd", "train"] == pytest.approx(whole - shifting, rel=0.1)


def test_writers_can_teach_together(again: Callable[..., tuple[Path, Seen]]) -> None:
    """All who learn from teachers hear the mixture, and pay for it out of the same budget."""
    out, seen = again(
        "distill.mixed=2",
        "evaluate.references=[pooled_text_dense, dense_kd, ofa_kd]",
        "baselines.ofa_kd.stages=1",
    )
    assert {"mix", "joint", "tune", "dense_kd"} <= set(seen.ran)
    compute = {(part["system"], part["part"]): part["token_parameters"] for part in results(out)["compute"]}
    asking = compute["deepfusion", "mix"]
    assert asking > 0
    assert (compute["dense_kd", "mix"], compute["ofa_kd", "mix"]) == (asking, asking)
    assert ("pooled_text_dense", "mix") not in compute
    whole = compute["pooled_text_dense", "train"]
    assert compute["dense_kd", "train"] == pytest.approx(whole - asking, rel=0.1)


@pytest.mark.parametrize("other", ["distill.teachers=proxies", "distill.shifted=true", "distill.shares.joint=0"])
def test_only_writers_can_teach_together(other: str) -> None:
    beside = ("distill.shares.branch=0.96",) if "joint" in other else ()
    with pytest.raises(ValueError, match="mixed"):
        recipe("distill.mixed=2", other, *beside)


def test_written_text_can_be_read_by_the_others(again: Callable[..., tuple[Path, Seen]]) -> None:
    out, seen = again("transfer.keep_agreed=0.5", "evaluate.references=[pooled_text_dense]")
    found = results(out)
    readers = {name for name in seen.ran if name.startswith("read")}
    assert {f"read {device}" for device in DEVICES} < readers
    assert len(readers) == len(DEVICES) + 2  # and both ancestors
    counts = found["transfer"]["counts"]
    assert counts["sampled"] - counts["dropped sampled: nobody agrees"] in {0, 1, 2}  # of two clusters, rounded up
    compute = {(part["system"], part["part"]): part["token_parameters"] for part in found["compute"]}
    assert compute["pooled_text_dense", "write"] == compute["deepfusion", "write"]


@pytest.mark.parametrize("other", ["distill.teachers=proxies", "distill.objective.kind=vaa", "distill.shares.joint=0"])
def test_only_writers_can_be_shifted(other: str) -> None:
    beside = ("distill.shares.branch=0.96",) if "joint" in other else ()
    with pytest.raises(ValueError, match="shifted needs"):
        recipe("distill.shifted=true", other, *beside)


def test_types_of_several_ancestors_are_not_averaged(again: Callable[..., tuple[Path, Seen]]) -> None:
    """Type-pure clusters, but too few for two ancestors of one type."""
    gpt2 = recipe().models.ancestors["gpt2"].model_dump_json()
    with pytest.raises(
        ValueError, match=r"cluster\.k is 1 but the devices have 2 lineages \(gpt2-h16.*, gpt2-h16.*\): .*by_domain"
    ):
        again("cluster.mode=by_type", "cluster.k=1", "assemble.top_k=1", f"models.ancestors.neox={gpt2}")


@pytest.mark.parametrize("shares", ["{joint: 1, branch: 0, tune: 0}", "{joint: 0, branch: 1, tune: 0}"])
def test_stages_can_be_left_out(shares: str, again: Callable[..., tuple[Path, Seen]]) -> None:
    out, seen = again(f"distill.shares={shares}", "evaluate.references=[dense_kd, dense_kd]")
    assert "tune" not in seen.ran + seen.found
    merged = next(path for path in out.glob("steps/assemble/*") if (out / "moe" / WEIGHTS).samefile(path / WEIGHTS))
    assert merged.name.startswith("assemble-")
    rows = {(row["system"], row["metric"], row["subset"], row["domain"]): row["value"] for row in results(out)["rows"]}
    for (system, *what), value in rows.items():
        assert system != "merged" or rows["deepfusion", *what] == value


def test_a_changed_encoder_embeds_anew(
    again: Callable[..., tuple[Path, Seen]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an encoder's folder holds is part of the key, and not its name alone."""

    def broken(**_: Any) -> Upload:
        raise RuntimeError("begun")  # which leaves the folder

    encoder = tmp_path / "encoder"
    with pytest.raises(InputError, match=f"device.encoder: {encoder} does not exist"):
        again(f"device.encoder={encoder}")
    encoder.mkdir()
    monkeypatch.setattr(device, "train_device", broken)
    for number, content in enumerate(("one", "two", "one"), 1):
        (encoder / "config.json").write_text(content)
        with pytest.raises(ValueError, match="not one upload was accepted"):
            again(f"device.encoder={encoder}")
        assert len(list(tmp_path.glob("run/steps/device/*.partial"))) == 4 * min(number, 2)


def test_proxies_write_for_large_clusters(again: Callable[..., tuple[Path, Seen]]) -> None:
    out, _ = again("transfer.max_writers=1", "evaluate.references=[]")
    assert all(name.startswith("cluster-") for name in results(out)["transfer"]["by_writer"])


def test_steps_are_called_what_they_are_about(done: tuple[Path, Report, Seen]) -> None:
    names = set(done[2].ran)
    proxies = results(done[0])["clusters"]["proxies"]
    for cluster in (0, 1):
        types = [proxy["model_type"] for proxy in proxies if proxy["cluster"] == cluster]
        labels = [f"cluster-{cluster}"] if len(types) == 1 else [f"cluster-{cluster}-{name}" for name in types]
        assert {f"proxy {label}" for label in labels} <= names
        assert {f"evaluate proxy-{label}" for label in labels} <= names
    assert {"evaluate device-00", "evaluate branch-cluster-1", "evaluate deepfusion"} <= names


def test_adapters_are_sent_and_made_whole(
    again: Callable[..., tuple[Path, Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four devices one trains an adapter that is not finite: it is left out, and the others go on."""
    save = adapters.save

    def poisoned(model: Any, ancestor: Path, lora: LoRA, folder: Path) -> None:
        save(model, ancestor, lora, folder)
        if folder.parent.name.startswith("device-02"):
            held = load_file(folder / adapters.WEIGHTS)
            next(iter(held.values())).fill_(torch.nan)
            save_file(held, folder / adapters.WEIGHTS)

    monkeypatch.setattr(adapters, "save", poisoned)
    out, seen = again("device.method=lora", "device.upload=adapter", "device.epochs=2", "evaluate.references=[]",
                      "transfer.kinds=[public]", "distill.budget_tokens=1000")  # fmt: skip
    found = results(out)
    left = [device for device in DEVICES if device != "device-02"]
    assert [rejected["device"] for rejected in found["rejected"]] == ["device-02"]
    assert "adapter_model.safetensors: tensor " in found["rejected"][0]["reason"]
    assert found["rejected"][0]["reason"].endswith(" holds NaN or infinity")
    assert {f"materialise {device}" for device in left} <= set(seen.ran)
    assert {f"evaluate {device}" for device in left} <= set(seen.ran)
    assert "materialise device-02" not in seen.ran
    for one in found["devices"]:
        [folder] = [path for path in out.glob(f"steps/device/{one['device']}-*") if (path / "adapter").is_dir()]
        assert one["bytes"] == sum(path.stat().st_size for path in (folder / "adapter").iterdir()) + 64
        assert one["bytes"] == found["bytes"]["per_device"][one["device"]]["up"]
        assert (one["method"], one["sends"]) == ("lora", "adapter")
        assert 0 < one["trained_parameters"] < one["parameters"]
        assert 0 < one["before_bytes"] <= one["training_peak_bytes"]
        peak = found["memory"]["device_peak_bytes"][one["device"]]
        assert one["training_peak_bytes"] <= peak


@pytest.mark.parametrize("upload", ["merged", "adapter"])
def test_packed_uploads_are_made_whole(
    upload: str, again: Callable[..., tuple[Path, Seen]], done: tuple[Path, Report, Seen]
) -> None:
    """A run with a codec is the one without, but for what the codec loses; and devices send a fraction."""
    others = ["evaluate.references=[]"]
    codec = "{numbers: int8, delta: true}"
    if upload == "adapter":
        others += ["device.method=lora", "device.upload=adapter"]
        codec = "{numbers: int8}"
        exact = results(again(*others)[0])
    else:
        exact = results(done[0])
    out, seen = again(*others, f"device.codec={codec}")
    found = results(out)
    assert {f"materialise {device}" for device in DEVICES} <= set(seen.ran)
    label = "int8 delta" if upload == "merged" else "int8"
    for one in found["devices"]:
        [folder] = [path for path in out.glob(f"steps/device/{one['device']}-*") if (path / "packed").is_dir()]
        [file] = (folder / "packed").iterdir()
        assert one["bytes"] == file.stat().st_size + 64 == found["bytes"]["per_device"][one["device"]]["up"]
        assert not [path for path in folder.iterdir() if path.name in ("model", "adapter", ".model", ".adapter")]
        assert (one["sends"], one["codec"]) == ("packed", label)
        assert 0 < one["error"] < one["lost"] < 0.02
    assert found["bytes"]["up"] < exact["bytes"]["up"] * (0.2 if upload == "merged" else 0.4)
    assert "per cent of how far training took it" in (out / "report.html").read_text()
    assert exact["devices"][0]["codec"] is None
    perplexity = [
        next(row["value"] for row in tree["rows"] if row["system"] == "deepfusion"
             and (row["domain"], row["subset"], row["metric"]) == ("all", "all", "token_log_perplexity"))
        for tree in (exact, found)
    ]  # fmt: skip
    assert perplexity[1] == pytest.approx(perplexity[0], abs=0.1)


def test_each_device_sends_in_its_own_way(again: Callable[..., tuple[Path, Seen]]) -> None:
    """A model as it is, a model packed, an adapter, an adapter packed: in one fleet, and accepted all."""
    own = (
        "device.own={device-01: {codec: {numbers: int8, delta: true}}, device-02: {method: lora, upload: adapter}, "
        "device-03: {method: lora, upload: adapter, codec: {numbers: nf4}}}"
    )
    short = ["device.epochs=2", "evaluate.references=[]", "transfer.kinds=[public]", "distill.budget_tokens=1000"]
    plain, _ = again(*short)
    out, seen = again(*short, own)
    found = {one["device"]: one for one in results(out)["devices"]}
    assert results(out)["rejected"] == []
    ways = {name: (one["method"], one["sends"], one["codec"]) for name, one in found.items()}
    assert ways == {
        "device-00": ("full", "model", None),
        "device-01": ("full", "packed", "int8 delta"),
        "device-02": ("lora", "adapter", None),
        "device-03": ("lora", "packed", "nf4"),
    }
    parts = {step.removeprefix("materialise ") for step in seen.ran if step.startswith("materialise")}
    assert parts == {"device-01", "device-02", "device-03"}
    assert "device device-00" not in seen.ran  # does as it did: its step is the plain run's
    assert found["device-00"] == next(one for one in results(plain)["devices"] if one["device"] == "device-00")


def test_a_way_of_no_device_is_refused(again: Callable[..., tuple[Path, Seen]]) -> None:
    with pytest.raises(InputError, match=r"device\.own names tablet, and the devices are device-00, "):
        again("device.own={tablet: {method: lora}}")


def test_models_from_elsewhere_are_taken(
    again: Callable[..., tuple[Path, Seen]], done: tuple[Path, Report, Seen]
) -> None:
    base = next(done[0].glob("steps/make/base-*"))
    out, seen = again(f"models.base={{path: {base}}}", "evaluate.references=[]")
    assert "take base" in seen.ran
    assert {name for name in seen.ran if name.startswith(("device", "upload", "cluster", "write"))} == set()
    assert results(out)["rejected"] == []


def test_what_devices_learned_in_the_base_is_added_to_it(
    again: Callable[..., tuple[Path, Seen]], done: tuple[Path, Report, Seen]
) -> None:
    """Kin is told by content: another copy of the base's checkpoint, under another name."""
    base = next(done[0].glob("steps/make/base-*"))
    gpt2 = recipe().models.ancestors["gpt2"].model_dump_json()
    copy = shutil.copytree(base, done[0].parent / "copy", dirs_exist_ok=True)
    models = (f"models.base={{path: {base}}}", f"models.ancestors={{small: {gpt2}, kin: {{path: {copy}}}}}")
    out, seen = again(*models, "evaluate.references=[dense_kd]", "distill.task_vectors=0.25")
    assert {"task_vectors", "evaluate task_vectors", "joint", "dense_kd"} <= set(seen.ran)
    start = dict(tensors(next(out.glob("steps/task_vectors/*"))))
    before = dict(tensors(base))
    proxies = [
        json.loads((folder / "record.json").read_text()) | {"folder": folder} for folder in out.glob("steps/proxy/*")
    ]
    kin = [dict(tensors(proxy["folder"] / "model")) for proxy in proxies if proxy["model_type"] == "llama"]
    assert len(kin) == 2
    for name, tensor in start.items():
        torch.testing.assert_close(tensor, before[name] + 0.25 * sum(one[name] - before[name] for one in kin))
    systems = [row["system"] for row in results(out)["rows"]]
    assert "task_vectors" in systems
    _, seen = again(*models, "evaluate.references=[]", "distill.task_vectors=0.25", "distill.own_task_vectors=true")
    assert {"own_vector cluster-0", "own_vector cluster-1"} <= set(seen.ran)
    assert not any("no device starts from the base" in text for text in seen.said)
    out, seen = again("evaluate.references=[]", "distill.task_vectors=0.25")
    [told] = [text for text in results(out)["warnings"] if text in seen.said and "task_vectors" in text]
    assert told.startswith("no device starts from the base itself")
    out, seen = again(*models, "evaluate.references=[]", "distill.task_vectors=0", without="branch")
    assert {"joint", "branch cluster-0"} <= set(seen.ran)
    assert "task_vectors" not in seen.ran + seen.found + [row["system"] for row in results(out)["rows"]]


def test_branches_alone_start_from_what_devices_learned_too(
    again: Callable[..., tuple[Path, Seen]], done: tuple[Path, Report, Seen]
) -> None:
    base = next(done[0].glob("steps/make/base-*"))
    out, seen = again(
        f"models.base={{path: {base}}}", f"models.ancestors={{kin: {{path: {base}}}}}", "evaluate.references=[]",
        "distill.task_vectors=0.5", "distill.shares={joint: 0, branch: 1, tune: 0}",
    )  # fmt: skip
    assert {"task_vectors", "branch cluster-0", "evaluate joint_student"} <= set(seen.ran)
    assert "joint" not in seen.ran
    value = {
        (row["system"], *(row[key] for key in ("metric", "subset", "domain"))): row["value"]
        for row in results(out)["rows"]
    }
    for (system, *what), number in value.items():
        assert system != "joint_student" or value["task_vectors", *what] == number


@pytest.mark.parametrize("known", [True, False])
def test_a_run_says_where_it_computes_in_another_precision(
    known: bool, again: Callable[..., tuple[Path, Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepfusion.precision.knows_bfloat16", lambda _: known)
    out, seen = again("evaluate.dtype=bfloat16", "evaluate.references=[]")
    told = precision.TOLD.format(of="evaluate")
    assert (told in seen.said) is not known
    assert (told in results(out)["warnings"]) is not known
    monkeypatch.setattr("deepfusion.precision.knows_bfloat16", lambda _: not known)  # gone on with on another machine
    for folder in out.glob("steps/evaluate/merged-*"):
        shutil.rmtree(folder)
    seen = Seen()
    pipeline.run(recipe("evaluate.dtype=bfloat16", "evaluate.references=[]"), out, HERE, seen)
    assert seen.ran[0] == "evaluate merged"
    assert any(text.startswith("some systems were evaluated in bfloat16 and some") for text in seen.said)
