"""Writers and others as one teacher: by hand, and through real models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.artifacts import Checkpoint, Clusters, TransferSet, Upload, Work
from deepfusion.checkpoints import open_model, open_tokenizer
from deepfusion.config import DevicePhase, TransferPhase
from deepfusion.data.documents import TransferDocument, read_jsonl
from deepfusion.data.tokens import Tokenizer
from deepfusion.phases.device import train_device
from deepfusion.phases.mix import mix, mixture, prefix_weights
from deepfusion.phases.transfer import gather, write_cluster
from deepfusion.signals import Signal, Signals
from tiny import FAST, HERE, PRIVATE, checkpoint, clusters, corpus, folder

# ── by hand ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def signal(rows: int, k: int = 2) -> Signal:
    """Of a writer that wrote all tokens after the first."""
    return Signal(
        ids=np.arange(rows, dtype=np.int32),
        ends=np.arange(rows, dtype=np.int32),
        logprobs=np.array([-np.inf] + [0.0] * (rows - 1), np.float32),
        topk_ids=np.zeros((rows, k), np.int32),
        topk_logprobs=np.concatenate([np.full((1, k), -np.inf), np.zeros((rows - 1, k))]).astype(np.float16),
        gain=np.ones(rows, np.float16),
    )


def opinion(own: list[float], kept: list[list[float]], before: list[float]) -> tuple:
    def logs(values: list) -> np.ndarray:
        return np.log(np.array(values))

    return (logs([1.0, *own]), logs([[1.0, 1.0], *kept])), logs([1.0, *before])


def test_two_who_know_different_things_by_hand() -> None:
    """The other finds the first token four times as likely as its ancestor, the writer as likely as its own: 1 to 4."""
    writer = opinion([0.2, 0.9], [[0.2, 0.5], [0.9, 0.1]], [0.2, 0.1])
    other = opinion([0.8, 0.4], [[0.8, 0.1], [0.4, 0.6]], [0.2, 0.4])
    told = signal(3)
    mixed = mixture(told, [writer, other])
    np.testing.assert_allclose(np.exp(mixed.logprobs[1:]), [0.5, 0.2 * 0.9 + 0.8 * 0.4], rtol=1e-6)
    expected = [[0.5, 0.3], [0.2 * 0.9 + 0.8 * 0.4, 0.2 * 0.1 + 0.8 * 0.6]]
    np.testing.assert_allclose(np.exp(mixed.topk_logprobs[1:].astype(float)), expected, rtol=1e-3)
    assert np.isneginf(mixed.logprobs[0])
    assert np.isneginf(mixed.topk_logprobs[0]).all()
    assert (mixed.ids is told.ids, mixed.topk_ids is told.topk_ids, mixed.gain is told.gain) == (True,) * 3
    assert (mixed.logprobs.dtype, mixed.topk_logprobs.dtype) == (np.float32, np.float16)


def test_who_always_finds_text_likely_is_not_heard_the_more_for_it() -> None:
    """Its ancestor does so too: nothing was learned."""
    modest = opinion([0.1, 0.1], [[0.1, 0.1]] * 2, [0.1, 0.1])
    glib = opinion([0.9, 0.9], [[0.9, 0.1]] * 2, [0.9, 0.9])
    np.testing.assert_allclose(np.exp(mixture(signal(3), [modest, glib]).logprobs[1:]), [0.5, 0.5], rtol=1e-6)


def test_rows_on_which_the_writer_had_no_opinion_stay_so() -> None:
    told = signal(3)
    silent = told.logprobs.copy(), told.topk_logprobs.copy()
    silent[0][1], silent[1][1] = -np.inf, -np.inf
    told = replace(told, logprobs=silent[0], topk_logprobs=silent[1])
    writer = opinion([0.2, 0.9], [[0.2, 0.5], [0.9, 0.1]], [0.2, 0.1])
    mixed = mixture(told, [writer, writer])
    assert np.isneginf(mixed.logprobs[:2]).all()
    assert np.isneginf(mixed.topk_logprobs[:2]).all()
    assert np.exp(mixed.logprobs[2]) == pytest.approx(0.9)


@given(st.integers(1, 4), st.lists(st.floats(-20, 20), min_size=1, max_size=6), st.randoms())
def test_weights_are_of_what_came_before_and_add_up(heard: int, nats: list[float], random: object) -> None:
    gained = np.zeros((heard, len(nats) + 1))
    gained[:, 1:] = [random.sample(nats, len(nats)) for _ in range(heard)]  # pyright: ignore[reportAttributeAccessIssue]
    weights = prefix_weights(gained)
    np.testing.assert_allclose(np.exp(weights).sum(0), 1.0)
    np.testing.assert_allclose(np.exp(weights[:, :2]), 1 / heard)  # before the first word nobody has shown anything
    other = gained.copy()
    other[:, -1] += 7.0 * np.arange(heard)  # what comes last has no say in what is thought of it
    np.testing.assert_allclose(prefix_weights(other), weights)


# ── real models ───────────────────────────────────────────────────────────────────────────────────────────────────────


class World:
    """Two devices that wrote, of one ancestor."""

    def __init__(self, root: Path) -> None:
        self.corpus = corpus(folder(root / "corpus"))
        self.ancestor: Checkpoint = checkpoint("llama", root / "llama", hidden=32, heads=4)
        self.ancestors = {self.ancestor.lineage: self.ancestor}
        self.uploads: list[Upload] = [
            train_device(
                device, self.ancestor, "llama", self.corpus,
                DevicePhase(epochs=60, replay=0.0, training=FAST.model_copy(update={"learning_rate": 2e-2})),
                seed=0, into=folder(root / device), runtime=HERE,
            )
            for device in PRIVATE
        ]  # fmt: skip
        self.clusters: Clusters = clusters(root / "clusters")
        self.config = TransferPhase(sampled_per_cluster=6, min_bytes=4, max_new_tokens=48, top_k=3, batch=4)
        writings = [
            write_cluster(
                n, [upload], self.ancestors, self.clusters, self.corpus, self.config,
                encoder="hashing", seed=0, into=folder(root / f"writing-{n}"), runtime=HERE,
            )
            for n, upload in enumerate(self.uploads)
        ]  # fmt: skip
        self.transfer: TransferSet = gather(
            writings, self.clusters, self.corpus, self.config, encoder="hashing", into=folder(root / "transfer")
        )

    def mix(self, others: int, into: Path) -> TransferSet:
        return mix(
            self.transfer, self.uploads, self.ancestors, self.clusters, self.config, others=others,
            into=folder(into), runtime=HERE,
        )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def log_p(model: Path, ids: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        logits = open_model(model)(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
    return logits.double().log_softmax(-1)


def test_every_row_is_the_mixture_of_both_models(world: World, tmp_path: Path) -> None:
    made = world.mix(1, tmp_path)
    tokens = 0
    for upload in world.uploads:
        before = Signals.load(world.transfer.signals / f"{upload.device}.safetensors").of
        after = Signals.load(made.signals / f"{upload.device}.safetensors").of
        assert list(after) == list(before)
        for name, signal in before.items():
            tokens += len(signal.ids)
            each = [log_p(one.model, signal.ids) for one in world.uploads]
            spoken = torch.from_numpy(signal.ids[1:, None].astype(np.int64))
            public = log_p(world.ancestor.folder, signal.ids).gather(1, spoken)[:, 0]
            gained = torch.stack([one.gather(1, spoken)[:, 0] - public for one in each])
            weights = (gained.cumsum(1) - gained).softmax(0)
            whole = (weights[..., None] * torch.stack(each).exp()).sum(0)
            kept = torch.from_numpy(signal.topk_ids[1:].astype(np.int64))
            written = np.isfinite(signal.logprobs[1:])
            np.testing.assert_allclose(
                np.exp(after[name].topk_logprobs[1:].astype(float))[written], whole.gather(1, kept)[written], atol=2e-3
            )
            np.testing.assert_allclose(
                np.exp(after[name].logprobs[1:])[written], whole.gather(1, spoken)[:, 0][written], atol=1e-4
            )
    assert made.work == Work(tokens=3 * tokens, forward=3.0 * tokens * world.ancestor.active_parameters)
    assert made.counts == world.transfer.counts
    assert list(read_jsonl(made.documents, TransferDocument)) == list(
        read_jsonl(world.transfer.documents, TransferDocument)
    )
    assert TransferSet.load(tmp_path) == made


def test_a_device_that_nobody_can_help_teaches_alone(world: World, tmp_path: Path) -> None:
    alone = world.uploads[:1]
    made = mix(
        world.transfer, alone, world.ancestors, world.clusters, world.config, others=3, into=folder(tmp_path),
        runtime=HERE,
    )  # fmt: skip
    assert made.work == Work()
    for path in world.transfer.signals.iterdir():  # that of a writer that is no device too
        assert (made.signals / path.name).read_bytes() == path.read_bytes()


def test_the_tokenizers_stay_beside_the_signals(world: World, tmp_path: Path) -> None:
    made = world.mix(1, tmp_path)
    [kept] = made.tokenizers.iterdir()
    assert Tokenizer(open_tokenizer(kept)).fingerprint == kept.name
