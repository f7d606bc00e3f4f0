"""Every family: what a forward pass makes of documents, in whatever rows they lie."""

import pytest
import torch

from cases import Made
from deepfusion.checkpoints import open_model
from deepfusion.data.batches import collate
from deepfusion.data.lessons import Lesson
from deepfusion.families import context_length, head
from deepfusion.training import run
from deepfusion.writing import padded

pytestmark = pytest.mark.contracts
A, B, C = [0, 40, 41, 42, 43, 44, 45], [0, 50, 40, 51], [0, 61, 62, 40, 41, 63]


def lesson(ids: list[int]) -> Lesson:
    numbers = torch.tensor(ids).numpy()
    return Lesson(numbers, numbers.astype("float32"))


@torch.inference_mode()
def in_rows(made: Made, *rows: list[list[int]]) -> torch.Tensor:
    """Logits of documents packed in rows, as training sees them, one after another without padding."""
    batch = collate([[[lesson(ids) for ids in row] for row in rows]])
    said = run(made.model, batch).predictions
    return said.head(said.states)[batch["document"] >= 0]


def test_a_document_is_alone_in_its_row(made: Made) -> None:
    alone = torch.cat([made.logits(ids) for ids in (A, B, C)])
    torch.testing.assert_close(in_rows(made, [A], [B], [C]), alone, rtol=1e-4, atol=1e-4)
    if not made.family.packs:
        with pytest.raises(ValueError, match=f"{made.case.model_type} cannot keep documents apart within a row"):
            in_rows(made, [A, B], [C])
        return
    torch.testing.assert_close(in_rows(made, [A, B], [C]), alone, rtol=1e-4, atol=1e-4)
    together = made.logits(A + B)[len(A) :]
    assert (together - alone[len(A) : len(A + B)]).abs().max() > 0.01  # what isolation has kept away


def test_packing_keeps_what_the_attention_does(made: Made) -> None:
    """Sliding windows, and eager attention's own form of a mask, are lost to a plain one."""
    every = torch.ones(1, 1, len(A), len(A), dtype=torch.bool).tril()
    if not made.family.packs:
        with pytest.raises(ValueError, match=f"{made.case.model_type} cannot hold several documents in one row"):
            made.family.attention_masks(made.model.config, every)
        return
    asked = {"input_ids": torch.tensor([A]), "position_ids": torch.arange(len(A))[None]}
    with torch.inference_mode():
        ours = made.model(**asked, attention_mask=made.family.attention_masks(made.model.config, every)).logits[0]
        plain = made.model(**asked, attention_mask=every).logits[0]
    torch.testing.assert_close(ours, made.logits(A), rtol=1e-4, atol=1e-4)
    special = "window" in made.name or made.case.model_type == "gemma2"
    assert ((plain - ours).abs().max() > 0.01) == special


def test_nothing_is_random_in_training(made: Made) -> None:
    model = open_model(made.folder).train()
    ids = torch.tensor([A])
    torch.testing.assert_close(model(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert not any(isinstance(part, torch.nn.Dropout) and part.p for part in model.modules())


@torch.inference_mode()
def test_hidden_states_are_the_layers(made: Made) -> None:
    """One of the embedding and one after each layer, all of one width; and what enters the head, caps included."""
    ids, mask = padded([A, B], 0, made.model.device)
    entering, hidden = made.family.hidden_states(made.model, ids, mask)
    assert [tuple(states.shape) for states in hidden] == [(2, len(A), 32)] * (1 + made.model.config.num_hidden_layers)
    for row, text in enumerate((A, B)):
        said = head(made.model)(entering)[row, : len(text)]
        torch.testing.assert_close(said, made.logits(text), rtol=1e-4, atol=1e-4)
        alone = made.family.hidden_states(made.model, torch.tensor([text]), torch.ones(1, len(text)))[1]
        for states, others in zip(hidden, alone, strict=True):
            torch.testing.assert_close(states[row, : len(text)], others[0], rtol=1e-4, atol=1e-4)
    narrows = getattr(made.model.base_model, "decoder", None)
    narrows = getattr(narrows, "project_out", None) or torch.nn.Identity()
    torch.testing.assert_close(narrows(hidden[-1]), entering, rtol=0, atol=0)


def test_the_context_is_what_a_model_keeps_to(made: Made) -> None:
    """Texts of LongRoPE models are read in another way as soon as there is one beyond 64 tokens: that is refused."""
    long = made.name == "phi3, long"
    assert context_length(made.model.config) == (None if made.case.model_type == "bloom" else 64 if long else 128)
    ids, mask = padded([A, [*A, *range(40, 100)]], 0, made.model.device)
    with torch.inference_mode():
        beside = made.model(ids, attention_mask=mask).logits[0, : len(A)]
    assert ((beside - made.logits(A)).abs().max() > 1e-3) == long
