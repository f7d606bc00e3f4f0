import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deepfusion import adapters, weights
from deepfusion.artifacts import Clusters, Proxy, Upload
from deepfusion.checkpoints import as_checkpoint, open_model, validate
from deepfusion.config import LoRA, ProxyPhase
from deepfusion.phases.proxy import average, average_folders, by_lineage, mean, means, name_of
from deepfusion.weights import WEIGHTS, tensors
from fuse import Blown, Fuse, contents
from pico import pico

NORTH, EAST = bytes([0, 100]).hex(), bytes([100, 0]).hex()


def upload(folder: Path, device: str, **changes: object) -> Upload:
    """An upload with a pico model whose seed is the device's number."""
    model_type = str(changes.pop("model_type", "llama"))
    made = as_checkpoint(pico(model_type, folder / "model", seed=int(device[-2:]), **changes.pop("made", {})))  # pyright: ignore[reportArgumentType, reportCallIssue]
    (made.folder / "record.json").unlink()
    facts = {"ancestor": "small", "lineage": f"{model_type}-x", "tokens": 10, "embedding": NORTH} | changes
    return Upload(
        folder=folder,
        device=device,
        model_type=model_type,
        parameters=made.parameters,
        active_parameters=made.active_parameters,
        bytes=0,
        **facts,  # pyright: ignore[reportArgumentType]
    )


def three(folder: Path, **changes: object) -> list[Upload]:
    return [upload(folder / f"device-0{n}", f"device-0{n}", **changes) for n in (1, 2, 3)]


# ── the mean ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_mean_by_hand() -> None:
    two = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, -1.0])]
    torch.testing.assert_close(mean(two, [1, 1]), torch.tensor([2.5, 0.5]))
    torch.testing.assert_close(mean(two, [2, 1]), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(mean(two, [0, 3]), two[1])
    assert torch.equal(two[0], torch.tensor([1.0, 2.0]))  # left as it was
    assert mean([torch.ones(1, dtype=torch.bfloat16)], [1]).dtype == torch.float32


def test_mean_of_integers() -> None:
    assert torch.equal(mean([torch.tensor([3, 4])] * 2, [1, 1]), torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="have no mean"):
        mean([torch.tensor([3]), torch.tensor([4])], [1, 1])


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0.0625, 100), min_size=1, max_size=8),
    st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8),
)
def test_mean_is_inside_and_exact_for_equals(weights: list[float], values: list[float]) -> None:
    members = [torch.tensor([value]) for value in values[: len(weights)]]
    middle = float(mean(members, weights))
    assert min(map(float, members)) - 1e-4 <= middle <= max(map(float, members)) + 1e-4
    expected = sum(w * float(m) for w, m in zip(weights, members, strict=True)) / sum(weights)
    assert middle == pytest.approx(expected, abs=1e-3)
    assert torch.equal(mean([members[0]] * len(weights), weights), members[0])


def test_links_of_one_file_are_read_once_or_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"w": torch.tensor([[0.1, -0.0], [3.0, -7.7]]), "ids": torch.tensor([7])}
    save_file(held, tmp_path / "one")
    for number in range(5):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / WEIGHTS).hardlink_to(tmp_path / "one")
    read, asked = weights.Stored.read, list[str]()
    monkeypatch.setattr(weights.Stored, "read", lambda one, rows=None: asked.append("") or read(one, rows))
    for weighing in ([1.0] * 5, [0.0, 0.0, 2.0, 0.0, 0.0]):
        for name, tensor in held.items():
            asked.clear()
            [found] = means([weights.stored(tmp_path / f"{number}")[name] for number in range(5)], weighing)
            assert len(asked) == 2
            exactly = mean([tensor] * 5, weighing)
            assert found.numpy().tobytes() == exactly.numpy().tobytes()  # the sign of zeros too


# ── a proxy ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("weighting", "weights"), [("uniform", (1 / 3,) * 3), ("tokens", (0.2, 0.3, 0.5))])
def test_proxy_is_its_members_mean(weighting: str, weights: tuple[float, ...], tmp_path: Path) -> None:
    members = [m.model_copy(update={"tokens": t}) for m, t in zip(three(tmp_path), (20, 30, 50), strict=True)]
    into = tmp_path / "proxy"
    into.mkdir()
    proxy = average(members, 2, ProxyPhase(weights=weighting), into=into)  # pyright: ignore[reportArgumentType]
    assert (proxy.cluster, proxy.lineage, proxy.warnings) == (2, "llama-x", ())
    assert proxy.members == ("device-01", "device-02", "device-03")
    assert proxy.weights == pytest.approx(weights)
    assert name_of(proxy) == "cluster-2-llama-x"
    assert Proxy.load(into) == proxy
    held = [dict(tensors(member.model)) for member in members]
    flat = [torch.cat([tensor.flatten() for tensor in one.values()]) for one in held]
    middle = sum(weight * one for weight, one in zip(weights, flat, strict=True))
    found = torch.cat([tensor.flatten() for _, tensor in tensors(proxy.model)])
    torch.testing.assert_close(found, middle)
    farthest = max(float((one - found).norm() / found.norm()) for one in flat)
    assert proxy.distance == pytest.approx(farthest, rel=1e-5)
    validate(proxy.model)
    assert (proxy.model / "tokenizer.json").read_bytes() == (members[0].model / "tokenizer.json").read_bytes()


def test_single_member_is_its_own_proxy(tmp_path: Path) -> None:
    into = tmp_path / "proxy"
    into.mkdir()
    member = upload(tmp_path / "one", "device-01")
    proxy = average([member], 0, ProxyPhase(), into=into)
    assert (proxy.distance, proxy.weights) == (0.0, (1.0,))
    assert (proxy.model / WEIGHTS).read_bytes() == (member.model / WEIGHTS).read_bytes()


def test_dtype_of_the_members_is_kept(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, value in zip(folders, (1.0, 2.0, 2.0), strict=True):
        folder.mkdir()
        save_file({"w": torch.full((2,), value, dtype=torch.bfloat16), "ids": torch.tensor([7])}, folder / WEIGHTS)
    assert average_folders(folders[:2], [1, 1], into=tmp_path / "mean") == pytest.approx(1 / 3)  # .5 of 1.5
    found = dict(tensors(tmp_path / "mean"))
    assert torch.equal(found["w"], torch.full((2,), 1.5, dtype=torch.bfloat16))
    assert torch.equal(found["ids"], torch.tensor([7]))
    save_file({"w": torch.ones(2), "ids": torch.tensor([7])}, folders[2] / WEIGHTS)
    average_folders(folders, [1, 1, 1], into=tmp_path / "mixed")
    assert dict(tensors(tmp_path / "mixed"))["w"].dtype == torch.float32
    save_file({"w": torch.ones(3), "ids": torch.tensor([7])}, folders[2] / WEIGHTS)
    with pytest.raises(ValueError, match="different names or shapes"):
        average_folders(folders, [1, 1, 1], into=tmp_path / "never")
    save_file({"w": torch.ones(2), "ids": torch.tensor([8])}, folders[2] / WEIGHTS)
    with pytest.raises(ValueError, match="ids: tensors of integers differ"):
        average_folders(folders, [1, 1, 1], into=tmp_path / "never")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_average_is_gone_on_from(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, fuse = three(tmp_path), Fuse(2**14)
    for member in members:
        save_file({name: tensor.to(dtype) for name, tensor in tensors(member.model)}, member.model / WEIGHTS)
    monkeypatch.setattr("deepfusion.phases.proxy.write", fuse.write)
    monkeypatch.setattr(weights, "BLOCK", 1000)  # elements: the larger tensors are made in blocks

    def attempt(into: Path) -> Proxy:
        into.mkdir(exist_ok=True)
        return average(members, 0, ProxyPhase(), into=into, resume=True)

    undisturbed = attempt(tmp_path / "undisturbed")
    everything, into = list(fuse.made), tmp_path / "disturbed"
    fuse.lasts = len(everything) // 2
    with pytest.raises(Blown):
        attempt(into)
    fuse.lasts = len(everything)
    resumed = attempt(into)
    assert 0 < len(fuse.made) < len(everything) - 5
    assert resumed.distance == undisturbed.distance > 0
    assert contents(into) == contents(undisturbed.folder)
    assert attempt(into).digest == undisturbed.digest
    assert fuse.made == []


def test_a_proxy_of_adapters_is_the_mean_of_what_they_add(tmp_path: Path) -> None:
    """W + mean of B·A, which is not W + (mean of B)·(mean of A): by hand, 1·1 and 3·5 add 8 on average, and not 2·3."""
    ancestor, lora = pico("llama", tmp_path / "ancestor"), LoRA(rank=1, alpha=1.0)
    place, folders = "model.layers.0.mlp.up_proj", [tmp_path / "one", tmp_path / "other"]
    for folder, a, b in zip(folders, (1.0, 5.0), (1.0, 3.0), strict=True):
        model = open_model(ancestor)
        adapters.attach(model, lora, seed=0)
        with torch.no_grad():
            for part, value in (("A", a), ("B", b)):
                matrix = model.get_parameter(f"{place}.lora_{part}.default.weight")
                matrix.zero_()[0, 0] = value
        adapters.save(model, ancestor, lora, folder / "adapter")
        adapters.merge(ancestor, folder / "adapter", lora, into=folder / "model")
    average_folders([folder / "model" for folder in folders], [0.5, 0.5], into=tmp_path / "mean")
    own, mean_of = dict(tensors(ancestor))[f"{place}.weight"], dict(tensors(tmp_path / "mean"))[f"{place}.weight"]
    assert float(mean_of[0, 0] - own[0, 0]) == pytest.approx(8.0)
    mean_of[0, 0] = own[0, 0]
    assert torch.equal(mean_of, own)


def test_ties_keep_what_members_agree_on(tmp_path: Path) -> None:
    """Members that change different tensors keep their changes whole, where the mean would halve them."""
    ancestor = as_checkpoint(pico("llama", tmp_path / "ancestor", seed=9))
    before = dict(tensors(ancestor.folder))
    norm, head = "model.norm.weight", "model.embed_tokens.weight"
    uploads: list[Upload] = []
    for number, name in enumerate((norm, head), 1):
        one = upload(tmp_path / f"device-0{number}", f"device-0{number}")
        save_file({**before, name: before[name] + number}, one.model / WEIGHTS, metadata={"format": "pt"})
        uploads.append(one)
    config = ProxyPhase(method="ties", density=1.0)
    proxy = average(uploads, 0, config, ancestor=ancestor, into=tmp_path / "proxy")
    made = dict(tensors(proxy.model))
    for name, tensor in before.items():
        torch.testing.assert_close(made[name], tensor + (1 if name == norm else 2 if name == head else 0))
    validate(proxy.model)
    assert proxy.distance > 0


def test_ties_need_the_members_ancestor(tmp_path: Path) -> None:
    other = as_checkpoint(pico("llama", tmp_path / "ancestor", layers=1))
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.1\..* which its descendants have"):
        average(three(tmp_path), 0, ProxyPhase(method="ties"), ancestor=other, into=tmp_path / "proxy")


def test_strangers_are_named(tmp_path: Path) -> None:
    one, two, three_ = three(tmp_path)
    members = [one, two, three_.model_copy(update={"embedding": EAST})]
    (tmp_path / "proxy").mkdir()
    proxy = average(members, 1, ProxyPhase(), into=tmp_path / "proxy")
    assert len(proxy.warnings) == 2
    assert "cluster 1: device-01 and device-03 have texts of cosine 0.00, below 0.8" in proxy.warnings[0]


def test_of_many_strangers_a_few_are_named(tmp_path: Path) -> None:
    [one, *_] = three(tmp_path)
    embeddings = [NORTH, EAST, NORTH, EAST, bytes([80, 100]).hex()]  # the last is at .62 and .78 from the others
    members = [one.model_copy(update={"device": f"d-{n}", "embedding": e}) for n, e in enumerate(embeddings)]
    (tmp_path / "proxy").mkdir()
    warnings = average(members, 1, ProxyPhase(), into=tmp_path / "proxy").warnings
    assert [line.partition(" have")[0] for line in warnings[:3]] == [
        "cluster 1: d-0 and d-1",
        "cluster 1: d-0 and d-3",
        "cluster 1: d-1 and d-2",
    ]
    assert warnings[3:] == ("cluster 1: so have 5 more of the 10 pairs of its llama devices",)


def test_mixtures_are_refused_by_name(tmp_path: Path) -> None:
    one = upload(tmp_path / "one", "device-01", model_type="gpt2")
    other = one.model_copy(update={"device": "device-04"})

    def refusal(**changes: str) -> str:
        with pytest.raises(ValueError, match=r"Set cluster\.mode: by_domain\.") as caught:
            average([one, other.model_copy(update=changes)], 3, ProxyPhase(), into=tmp_path)
        return str(caught.value)

    assert refusal(model_type="llama", lineage="llama-x") == (
        "cluster 3 mixes gpt2 (device-01) and llama (device-04); their weights cannot be averaged. "
        "Set cluster.mode: by_domain."
    )
    assert refusal(ancestor="big", lineage="gpt2-y").startswith(
        "device-01 and device-04 are both gpt2 but come from different ancestors (small, big)"
    )
    assert "differ in shapes, tokenizer" in refusal(lineage="gpt2-y")
    with pytest.raises(ValueError, match="cluster 3 has no models"):
        average([], 3, ProxyPhase(), into=tmp_path)
    with pytest.raises(ValueError, match=r"set proxy\.weights: uniform"):
        average([one.model_copy(update={"tokens": 0})], 3, ProxyPhase(weights="tokens"), into=tmp_path)


def test_by_lineage(tmp_path: Path) -> None:
    one, two, three_ = three(tmp_path)
    gpt2 = two.model_copy(update={"lineage": "gpt2-x"})
    clusters = Clusters(
        folder=tmp_path,
        k=2,
        members=(("device-03", "device-02", "device-01"), ()),
        similarity=(),
        devices=("device-01", "device-02", "device-03"),
        centroids=("", ""),
    )
    assert by_lineage([one, gpt2, three_], clusters) == [(0, "gpt2-x", [gpt2]), (0, "llama-x", [three_, one])]
    with pytest.raises(ValueError, match="cluster 0 names device-02, which uploaded no model"):
        by_lineage([one, three_], clusters)


MEASURE = """
import sys
from pathlib import Path
from deepfusion.phases.proxy import average_folders
folders = [Path(folder) for folder in sys.argv[2:]]
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
average_folders(folders[:2], [1.0, 1.0], into=Path(sys.argv[1]) / "two")
before = peak()
average_folders(folders, [1.0] * len(folders), into=Path(sys.argv[1]) / "all")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_members(tmp_path: Path) -> None:
    folders = [tmp_path / f"{n}" for n in range(12)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        save_file({f"w{i}": torch.full((1024, 512), float(number)) for i in range(8)}, folder / WEIGHTS)  # 16 MiB
    # glibc keeps freed blocks of this size for later unless told a threshold, and how many it keeps is chance.
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},
    )
    assert int(ran.stdout) < 2 * 2**20  # one tensor, let alone one of the ten further models
    assert float(dict(tensors(tmp_path / "all"))["w3"][5, 5]) == pytest.approx(5.5)
