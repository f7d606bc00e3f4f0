import json
from pathlib import Path

import pytest
import torch

from deepfusion.artifacts import Checkpoint, Client, Round
from deepfusion.baselines.fedjets import average_experts, choose, preferences, prune, train_client, tune_round
from deepfusion.checkpoints import as_checkpoint, open_config, open_model, open_tokenizer
from deepfusion.config import AssemblePhase, DevicePhase, TunePhase
from deepfusion.data.documents import Document
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import experts
from deepfusion.phases.assemble import upcycle
from deepfusion.phases.upload import upload_bytes
from deepfusion.weights import Part, tensors, write
from tiny import FAST, HERE, PRIVATE, checkpoint, corpus, documents, folder, transfer

K = 3
RANDOM = AssemblePhase(router="random")
DEVICE = DevicePhase(epochs=8, training=FAST, replay=0.0)
FINE = AssemblePhase(router="random", layout="fine_grained", granularity=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("llama", tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory, base: Checkpoint) -> Checkpoint:
    return upcycle(base, K, RANDOM, seed=0, into=folder(tmp_path_factory.mktemp("models") / "moe"))


def held(place: Path) -> dict[str, torch.Tensor]:
    return dict(tensors(place))


def expert(layer: int, number: int, matrix: str = "w2") -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{matrix}.weight"


GATE = "model.layers.0.block_sparse_moe.gate.weight"

# ── on a device ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_device_gets_the_experts_that_it_prefers_and_an_anchor_its_own() -> None:
    preferred = torch.tensor([0.1, 0.5, 0.4, 0.0])
    assert choose(preferred, 2, None) == [1, 2]
    assert choose(preferred, 2, 3) == [1, 3]
    assert choose(preferred, 1, 0) == [0]
    assert choose(torch.zeros(4), 2, None) == [0, 1]  # of equals the first


def test_preferences_are_mean_gates_of_what_enters_the_bases_ffns(base: Checkpoint, moe: Checkpoint) -> None:
    text = documents(PRIVATE["d-law"], "law")
    found = preferences(base, moe, text, HERE)
    model, tokenizer = open_model(base.folder), Tokenizer(open_tokenizer(base.folder))
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, 1:]))
    for document in text:
        with torch.inference_mode():
            model(torch.tensor([[tokenizer.start, *tokenizer.encode(document.text)[0]]]))
    gates = (torch.cat(seen) @ held(moe.folder)[GATE].T).softmax(-1)
    torch.testing.assert_close(found, gates.mean(0), atol=1e-5, rtol=1e-4)
    assert float(found.sum()) == pytest.approx(1)


def test_the_compact_moe_is_the_global_one_without_the_others(moe: Checkpoint, tmp_path: Path) -> None:
    prune(moe.folder, [0, 2], into=tmp_path / "compact")
    config = open_config(tmp_path / "compact")
    assert (experts(config).count, experts(config).chosen) == (2, 2)
    whole, part = held(moe.folder), held(tmp_path / "compact")
    assert torch.equal(part[expert(0, 1)], whole[expert(0, 2)])
    assert torch.equal(part[GATE], whole[GATE][[0, 2]])
    assert expert(0, 2) not in part
    common = [name for name in whole if "block_sparse_moe" not in name]
    assert all(torch.equal(part[name], whole[name]) for name in common)
    # Where the router never chooses the expert that is gone, the two are one function.
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        small = open_model(tmp_path / "compact")(ids).logits
        masked = open_model(moe.folder)
        gate = masked.model.layers[0].mlp.gate
        gate.register_forward_hook(_without_the_second)
        torch.testing.assert_close(masked(ids).logits, small, atol=1e-5, rtol=1e-4)


def _without_the_second(_: object, __: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    logits = output[0].clone()
    logits[:, 1] = -torch.inf
    weights, chosen = logits.softmax(-1).topk(2, -1)
    return logits, weights / weights.sum(-1, keepdim=True), chosen


def test_a_part_of_the_first_moe_is_the_base_whatever_its_type(tmp_path: Path) -> None:
    """Weights that do not add up to 1 would be scaled for all experts, of which a device has a few."""
    base = checkpoint("qwen2", tmp_path / "base")
    start = upcycle(base, K, AssemblePhase(router="random", renormalise=True), seed=0, into=folder(tmp_path / "moe"))
    prune(start.folder, [0, 2], into=tmp_path / "compact")
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        dense, part = open_model(base.folder)(ids).logits, open_model(tmp_path / "compact")(ids).logits
    torch.testing.assert_close(part, dense, atol=1e-4, rtol=1e-4)


def test_a_cluster_keeps_all_of_its_shards(base: Checkpoint, tmp_path: Path) -> None:
    whole = upcycle(base, K, FINE, seed=0, into=folder(tmp_path / "moe"))
    prune(whole.folder, [2], into=tmp_path / "compact")
    config = open_config(tmp_path / "compact")
    assert (experts(config).count, experts(config).clusters, experts(config).chosen) == (2, 1, 2)
    before, part = held(whole.folder), held(tmp_path / "compact")
    for shard in range(2):
        assert torch.equal(part[expert(0, shard)], before[expert(0, 4 + shard)])
    assert torch.equal(part[GATE], before[GATE][4:])
    text = documents(PRIVATE["d-law"], "law")
    assert preferences(base, whole, text, HERE).shape == (K,)


@pytest.mark.parametrize("anchor", [True, False])
def test_anchors_teach_the_router_and_others_leave_it_alone(
    anchor: bool, base: Checkpoint, moe: Checkpoint, tmp_path: Path
) -> None:
    text = corpus(folder(tmp_path / "corpus"))
    made = train_client(
        "d-law", moe, base, text, 2, 2, 5.0, DEVICE, anchor=anchor, seed=0, sitting=0,
        into=folder(tmp_path / "client"), runtime=HERE,
    )  # fmt: skip
    assert made.losses[-1][1] < made.losses[0][1]
    assert made.owner == (2 if anchor else None)
    assert len(made.experts) == 2
    before, after = held(moe.folder), held(made.model)
    rows = before[GATE][list(made.experts)]
    assert torch.equal(after[GATE], rows) != anchor
    assert not torch.equal(after[expert(0, 0)], before[expert(0, made.experts[0])])
    if anchor:
        assert 2 in made.experts
        found = preferences(base, _with_rows(moe, after[GATE], made.experts, tmp_path / "changed"), _law(), HERE)
        assert found[2] > preferences(base, moe, _law(), HERE)[2]
    whole = upload_bytes(made.model, b"")
    assert made.down_bytes == pytest.approx(whole, rel=0.05)  # the same model, and one more row of the router
    other = [name for name in after if f"experts.{1 - made.experts.index(2)}." in name] if anchor else []
    assert made.bytes == whole - sum(after[name].nbytes for name in other)  # of an anchor only its own is taken
    assert len(other) == (3 if anchor else 0)  # matrices of one layer
    assert Client.load(tmp_path / "client") == made


def _law() -> list[Document]:
    return documents(PRIVATE["d-law"], "law")


def _with_rows(moe: Checkpoint, rows: torch.Tensor, places: tuple[int, ...], into: Path) -> Checkpoint:
    changed = held(moe.folder)
    changed[GATE] = changed[GATE].clone()
    changed[GATE][list(places)] = rows
    folder(into)
    write(into, [Part.of(name, tensor) for name, tensor in changed.items()])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (into / name).write_bytes((moe.folder / name).read_bytes())
    return moe.model_copy(update={"folder": into})


# ── at the server ─────────────────────────────────────────────────────────────────────────────────────────────────────


def client(moe: Checkpoint, chosen: list[int], owner: int | None, tokens: int, plus: float, into: Path) -> Client:
    """What somebody made of a part: everything a constant more."""
    prune(moe.folder, chosen, into=into / "model")
    moved = {name: tensor + plus for name, tensor in held(into / "model").items()}
    write(into / "model", [Part.of(name, tensor) for name, tensor in moved.items()])
    return Client(
        folder=into, device=into.name, ancestor="base", model_type="mixtral", lineage=moe.lineage, parameters=1,
        active_parameters=1, tokens=tokens, embedding="", bytes=100, experts=tuple(chosen), owner=owner, down_bytes=40,
    ).sealed()  # fmt: skip


def test_each_part_is_the_mean_of_who_trained_it(base: Checkpoint, moe: Checkpoint, tmp_path: Path) -> None:
    """Weighted by tokens: an anchor's other expert does not count, nor anyone else's router."""
    made = average_experts(
        moe,
        [
            client(moe, [0, 1], None, 10, 1.0, folder(tmp_path / "a")),
            client(moe, [0, 2], None, 30, 2.0, folder(tmp_path / "b")),
            client(moe, [0, 1], 1, 60, 4.0, folder(tmp_path / "c")),
        ],
        base,
        into=folder(tmp_path / "mean"),
    )
    before, after = held(moe.folder), held(tmp_path / "mean")
    moved = {
        expert(0, 0): (10 * 1 + 30 * 2) / 40,  # not the anchor's
        expert(0, 1): (10 * 1 + 60 * 4) / 70,
        expert(0, 2, "w1"): 2.0,
        "model.layers.0.self_attn.q_proj.weight": (10 * 1 + 30 * 2 + 60 * 4) / 100,
    }
    for name, change in moved.items():
        torch.testing.assert_close(after[name], before[name] + change)
    torch.testing.assert_close(after[GATE], before[GATE] + torch.tensor([4.0, 4.0, 0.0])[:, None])
    size = upload_bytes(base.folder, b"")
    assert (made.number, made.up_bytes, made.down_bytes) == (1, 300, 3 * size + 120)
    again = average_experts(
        made, [client(moe, [1, 2], None, 5, 0.0, folder(tmp_path / "d"))], base, into=folder(tmp_path / "next")
    )
    assert (again.number, again.up_bytes, again.down_bytes) == (2, 400, 3 * size + 160)
    torch.testing.assert_close(held(tmp_path / "next")[expert(0, 0)], after[expert(0, 0)])  # nobody had it
    assert open_config(tmp_path / "next").num_local_experts == K
    with pytest.raises(ValueError, match="no device has sent a model"):
        average_experts(moe, [], base, into=folder(tmp_path / "none"))


def test_tuning_is_on_public_text_alone(base: Checkpoint, moe: Checkpoint, tmp_path: Path) -> None:
    text = transfer(folder(tmp_path / "transfer"), base)
    public = folder(tmp_path / "public")
    lines = [line for line in text.documents.read_text().splitlines() if json.loads(line)["kind"] == "public"]
    (public / "documents.jsonl").write_text("\n".join(lines) + "\n")
    sent = Round(**moe.model_dump(exclude={"digest"}), number=4, down_bytes=7, up_bytes=8).sealed()
    config = TunePhase(training=FAST, ownership=3.0)
    digests: set[str] = set()
    for name, source in (("all", text), ("alone", text.model_copy(update={"folder": public}))):
        made = tune_round(
            sent, source, config, budget=3.0 * moe.active_parameters * 300, seed=0, into=folder(tmp_path / name),
            runtime=HERE,
        )  # fmt: skip
        assert (made.number, made.down_bytes, made.up_bytes) == (4, 7, 8)
        assert made.work.tokens >= 300
        digests.add(as_checkpoint(tmp_path / name, lineage_of=moe.lineage).digest)
    assert len(digests) == 1
