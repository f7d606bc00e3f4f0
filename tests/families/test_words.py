"""Every family: what its models write, learn on a device and teach; also with vocabularies wider than a tokenizer's."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import Made
from deepfusion.alignment import patch_membership
from deepfusion.artifacts import Checkpoint, Corpus, Teaching, TransferSet, Upload
from deepfusion.checkpoints import as_checkpoint, open_model, open_tokenizer
from deepfusion.config import DevicePhase, DistillPhase, ProxyPhase, VAAObjective
from deepfusion.data.batches import collate
from deepfusion.data.documents import TransferDocument, read_jsonl
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import context_length
from deepfusion.objectives import build_objective
from deepfusion.phases.consult import consult
from deepfusion.phases.device import train_device
from deepfusion.phases.proxy import average
from deepfusion.phases.upload import receive
from deepfusion.signals import Signals
from deepfusion.students import transfer_lessons, widths
from deepfusion.training import Learner
from deepfusion.writing import write
from pico import pad_vocabulary, pico_checkpoint
from tiny import FAST, HERE, corpus, folder, transfer

pytestmark = pytest.mark.contracts
KNOWN, PADDING = 320, 8  # tokens of the tokenizer, and what models have beside them
OBJECTIVE = VAAObjective(stages=2, patches=3, width=8, heads=2, standardise="none")


def padded_copy(made: Made, into: Path) -> Path:
    return pad_vocabulary(shutil.copytree(made.folder, into), PADDING)


@pytest.mark.parametrize("padding", [0, PADDING])
def test_what_it_writes_is_what_it_thinks(padding: int, made: Made, tmp_path: Path) -> None:
    """Cached, batched and padded writing has the probabilities of one plain pass, over the tokenizer's tokens alone."""
    place = padded_copy(made, tmp_path / "padded") if padding else made.folder
    model, tokenizer = open_model(place), Tokenizer(open_tokenizer(place))
    assert (len(tokenizer.table), model.config.vocab_size) == (KNOWN, KNOWN + padding)
    made_up = write(model, tokenizer, ["", "Doctors prescribe"], max_new_tokens=70, temperature=1.0, top_k=4,
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
    longest = context_length(model.config) or 999
    for one, start in zip(made_up, (1, 1 + len(tokenizer.encode("Doctors prescribe")[0])), strict=True):
        assert len(one.signal.ids) == min(longest, start + 70)
        ids = torch.from_numpy(one.signal.ids).long()
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, :-1]
        if padding:
            assert (logits[:, KNOWN:].amax(-1) >= logits[:, :KNOWN].amax(-1)).any()  # what must not be written
        thought = logits[:, :KNOWN].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        told = torch.from_numpy(one.signal.logprobs)[1:]
        torch.testing.assert_close(told[told.isfinite()], thought[told.isfinite()], rtol=1e-3, atol=1e-3)
        assert ids.max() < KNOWN
        assert one.signal.topk_ids.max() < KNOWN


@dataclass(frozen=True)
class Taught:
    """A device's model with a padded vocabulary, and what it was asked."""

    ancestor: Checkpoint
    upload: Upload
    text: TransferSet
    told: Teaching


@pytest.fixture(scope="session")
def private(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def taught(made: Made, private: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    root = tmp_path_factory.mktemp("taught")
    ancestor = as_checkpoint(padded_copy(made, root / "ancestor"))
    training = FAST.model_copy(update={"learning_rate": 3e-3})
    upload = train_device("d-law", ancestor, "a", private, DevicePhase(epochs=4, training=training), seed=0,
                          into=folder(root / "device"), runtime=HERE)  # fmt: skip
    proxy = average([upload, upload], 0, ProxyPhase(), into=folder(root / "proxy"))
    text = transfer(folder(root / "text"))
    asking = DistillPhase(objective=OBJECTIVE, training=FAST, teacher_top_k=5)
    told = consult(proxy, 0, text, asking.consultation, into=folder(root / "told"), runtime=HERE)
    return Taught(ancestor, upload, text, told)


def test_a_device_trains_it(taught: Taught, tmp_path: Path) -> None:
    upload = taught.upload
    assert receive([upload], {}, embedding_bytes=64, into=folder(tmp_path)).accepted == ("d-law",)
    assert upload.losses[-1][1] < upload.losses[0][1]
    assert (upload.lineage, upload.parameters) == (taught.ancestor.lineage, taught.ancestor.parameters)
    assert open_model(upload.model).config.vocab_size == KNOWN + PADDING


def test_it_teaches_what_it_thinks(made: Made, taught: Taught) -> None:
    """Probabilities over the tokenizer's tokens, and two stages' hidden states averaged over three patches."""
    model, tokenizer = open_model(taught.upload.model), Tokenizer(open_tokenizer(taught.upload.model))
    signals = Signals.load(taught.told.signals).of
    assert taught.told.width == 32
    for document in read_jsonl(taught.text.documents, TransferDocument):
        signal = signals[document.id]
        inner, ends = tokenizer.encode(document.text)
        ids = torch.tensor([[tokenizer.start, *inner, tokenizer.end]])
        with torch.inference_mode():
            log_p = model(ids).logits[0, :-1, :KNOWN].log_softmax(-1)
            _, hidden = made.family.hidden_states(model, ids, torch.ones_like(ids))
        np.testing.assert_allclose(signal.logprobs[1:], log_p.gather(1, ids[0, 1:, None])[:, 0], atol=1e-3)
        np.testing.assert_allclose(signal.topk_logprobs[1:], log_p.topk(5, -1).values, atol=2e-2)
        assert signal.topk_ids.max() < KNOWN
        members = patch_membership(ends, len(document.text.encode()), 3)
        assert signal.features is not None
        for stage, states in enumerate(hidden[1:]):
            for patch in range(3):
                mean = torch.stack([states[0, 1 + token] for token, p in members if p == patch]).mean(0)
                np.testing.assert_allclose(signal.features[stage, patch], mean, rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """With the same tokenizer and other padding, or none; and with another tokenizer."""
    root = tmp_path_factory.mktemp("students")
    more = pad_vocabulary(pico_checkpoint("llama", root / "more").folder, 3 * PADDING, scale=0.01)
    return {
        "none": pico_checkpoint("llama", root / "none"),
        "more": as_checkpoint(more),
        "other": pico_checkpoint("llama", root / "other", vocab=310),
    }


def test_students_of_other_vocabularies_learn_from_it(taught: Taught, students: dict[str, Checkpoint]) -> None:
    training, said = FAST.model_copy(update={"context": 64}), [taught.told]
    text = {
        name: transfer_lessons(student, taught.text, said, training, cluster=0, ask="proxies", objective=OBJECTIVE)
        for name, student in students.items()
    }
    for name, lessons in text.items():
        assert len(lessons) == 3
        for lesson in lessons:
            assert lesson.features is not None
            assert lesson.ids.max() < (310 if name == "other" else KNOWN)
            if name == "other":
                assert lesson.chunk_logprobs is not None
                assert np.isfinite(lesson.chunk_logprobs).all()
            else:
                assert lesson.topk_ids is not None
                assert lesson.topk_ids.max() < KNOWN
    student = open_model(students["more"].folder)
    learner = Learner(student, build_objective(OBJECTIVE, 32, 2, widths(said)))
    loss = learner(**collate([[[lesson] for lesson in text["more"]]]))["loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())
