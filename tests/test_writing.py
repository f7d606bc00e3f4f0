from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepfusion import writing
from deepfusion.checkpoints import make_model, open_model, open_tokenizer
from deepfusion.config import MadeModel
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import FAMILIES
from deepfusion.writing import Written, drawn, prompt_nats, with_gain, write
from pico import TEXTS, pad_vocabulary, pico

PROMPTS = ("The capital", "", "Doctors prescribe veltrine against the marsh fever; merchants", "W")


def opened(name: str, folder: Path, **overrides: int) -> tuple[PreTrainedModel, Tokenizer]:
    pico(name, folder, overrides.pop("seed", 0), **overrides)
    model = open_model(folder)
    with torch.no_grad():  # so that greedy text is not the same token again and again
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.ndim < 2 else 3.0)
    return model, Tokenizer(open_tokenizer(folder))


def written(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str], seed: int = 0, **options: float
) -> list[Written]:
    settings = {"max_new_tokens": 12, "temperature": 0.0, "top_k": 4} | options
    return write(model, tokenizer, prompts, generator=torch.Generator().manual_seed(seed), **settings)  # pyright: ignore[reportArgumentType]


def new_tokens(one: Written, prompt: str, tokenizer: Tokenizer) -> list[int]:
    return one.signal.ids[1 + len(tokenizer.encode(prompt)[0]) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_what_transformers_generates(name: str, tmp_path: Path) -> None:
    model, tokenizer = opened(name, tmp_path)
    for prompt, one in zip(PROMPTS, written(model, tokenizer, PROMPTS), strict=True):
        ids = torch.tensor([[tokenizer.start, *tokenizer.encode(prompt)[0]]])
        expected = model.generate(  # pyright: ignore[reportCallIssue]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.end
        )[0, ids.shape[1] :].tolist()
        assert new_tokens(one, prompt, tokenizer) == expected
        assert one.finished == (expected[-1] == tokenizer.end)


def test_gain_is_what_the_writer_knows_more_than_its_ancestor(tmp_path: Path) -> None:
    model, tokenizer = opened("llama", tmp_path)
    ancestor = open_model(pico("llama", tmp_path / "ancestor", seed=9))
    signals = {str(i): one.signal for i, one in enumerate(written(model, tokenizer, ["", *PROMPTS], temperature=1.0))}
    for name, told in with_gain(signals, ancestor, tokenizer, batch=2).items():
        ids = torch.from_numpy(told.ids.astype(np.int64))[None]
        with torch.no_grad():
            before = ancestor(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
        expected = np.maximum(signals[name].logprobs[1:] - before, 0)
        assert told.gain is not None
        np.testing.assert_allclose(told.gain[1:], expected, atol=2e-3, rtol=2e-3)
        assert told.gain[0] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_kept_is_what_a_full_pass_says(name: str, tmp_path: Path) -> None:
    """Prompts of different lengths share a batch: the shorter are padded on the left, and must not notice."""
    model, tokenizer = opened(name, tmp_path)
    for prompt, one in zip(PROMPTS, written(model, tokenizer, PROMPTS, temperature=1.0), strict=True):
        signal, head = one.signal, 1 + len(tokenizer.encode(prompt)[0])
        ids = torch.from_numpy(signal.ids.astype(np.int64))
        with torch.inference_mode():
            log_p = torch.log_softmax(model(ids[None]).logits[0].float(), -1)[head - 1 : -1]
        best = log_p.topk(4, -1)
        np.testing.assert_allclose(signal.logprobs[head:], log_p.gather(1, ids[head:, None])[:, 0], atol=1e-4)
        np.testing.assert_allclose(signal.topk_logprobs[head:], best.values, atol=1e-2)
        assert (signal.topk_ids[head:] == best.indices.numpy()).mean() > 0.95  # but for ties
        assert np.isneginf(signal.logprobs[:head]).all()
        assert np.isneginf(signal.topk_logprobs[:head]).all()


def test_text_and_token_ends_agree(tmp_path: Path) -> None:
    model, tokenizer = opened("gpt2", tmp_path)
    for prompt, one in zip(PROMPTS, written(model, tokenizer, PROMPTS, seed=3, temperature=1.0), strict=True):
        assert one.text.startswith(prompt)
        spelt = [tokenizer.table[token] for token in one.signal.ids]
        assert one.signal.ends.tolist() == np.cumsum([len(piece) for piece in spelt]).tolist()
        assert not one.finished or b"".join(spelt).decode() == one.text


def scripted(model: PreTrainedModel, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a model's likeliest next tokens those of a list, whatever came before."""
    script = iter(tokens)

    def last_logits(*_: object) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.one_hot(torch.tensor([next(script)]), model.config.vocab_size).float(), None

    monkeypatch.setattr("deepfusion.writing._last_logits", last_logits)


def test_what_does_not_end_is_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = opened("llama", tmp_path)
    ids = tokenizer.encode("Ann 🙂")[0]
    for tokens, text, finished in (
        ([*ids, tokenizer.end], "Ann 🙂", True),
        ([*ids], "Ann 🙂", False),  # no end
        ([*ids[:-1], tokenizer.end], "Ann \ufffd", False),  # in the middle of a character
        ([tokenizer.end], "", True),
    ):
        scripted(model, tokens, monkeypatch)
        [one] = written(model, tokenizer, ["Who? "], max_new_tokens=len(tokens))
        assert (one.text, one.finished) == ("Who? " + text, finished)
        assert new_tokens(one, "Who? ", tokenizer) == tokens


def test_no_room_is_unfinished(tmp_path: Path) -> None:
    model, tokenizer = opened("gpt2", tmp_path, context=16)
    long = "The quick brown fox jumps over the lazy dog. " * 3
    one = written(model, tokenizer, [long])[0]
    assert (one.text, one.finished) == (long, False)
    assert one.signal.topk_ids.shape == (len(one.signal.ids), 0)
    some = written(model, tokenizer, ["What is"], max_new_tokens=100)[0]
    assert len(some.signal.ids) <= 16


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt_neox"])
def test_a_long_prompt_takes_no_room_from_others(name: str, tmp_path: Path) -> None:
    """Each text ends where its own tokens fill the context, and a prompt that does not fit stands alone."""
    model, tokenizer = opened(name, tmp_path, context=32)
    prompts = ["What", "The quick brown fox jumps over the lazy", "The quick brown fox jumps. " * 9, "W"]
    sizes = [1 + len(tokenizer.encode(prompt)[0]) for prompt in prompts]
    assert 20 < sizes[1] < 32 < sizes[2]
    together = written(model, tokenizer, prompts, max_new_tokens=100)
    for prompt, size, one in zip(prompts, sizes, together, strict=True):
        [alone] = written(model, tokenizer, [prompt], max_new_tokens=100)
        assert (one.text, one.finished) == (alone.text, alone.finished)
        assert one.signal.ids.tolist() == alone.signal.ids.tolist()
        assert one.finished or len(one.signal.ids) == max(32, size)
    assert together[2].text == prompts[2]


def test_the_generator_decides(tmp_path: Path) -> None:
    model, tokenizer = opened("llama", tmp_path)
    texts = [[one.text for one in written(model, tokenizer, PROMPTS, seed, temperature=1.0)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [[one.text for one in written(model, tokenizer, PROMPTS, seed)] for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_temperature_changes_the_choice_and_not_what_is_kept(tmp_path: Path) -> None:
    model, tokenizer = opened("llama", tmp_path)
    cold, greedy = (written(model, tokenizer, PROMPTS, temperature=t) for t in (1e-4, 0.0))
    for one, other in zip(cold, greedy, strict=True):
        assert one.text == other.text
        np.testing.assert_allclose(one.signal.logprobs, other.signal.logprobs, atol=1e-5)


# ── vocabularies from elsewhere ───────────────────────────────────────────────────────────────────────────────────────


@cache
def spaced() -> PreTrainedTokenizerFast:
    """SentencePiece-style: a space that no text has stands before the first word."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>"], show_progress=False)
    raw.train_from_iterator(TEXTS[:3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def model_for(tokenizer: PreTrainedTokenizerFast, extra: int = 0) -> PreTrainedModel:
    made = MadeModel(type="llama", hidden=16, ffn=16, layers=1, heads=2)
    model = make_model(made, pico_like(tokenizer), 0)
    if extra:
        model.resize_token_embeddings(len(tokenizer) + extra, mean_resizing=False)
    return model


def pico_like(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, with the one special token that made models ask for."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    return tokenizer


def test_a_dummy_space_is_in_no_span() -> None:
    raw = spaced()
    tokenizer, model = Tokenizer(raw), model_for(raw)
    prompt = "What is the capital? "
    [one] = written(model, tokenizer, [prompt], temperature=1.0)
    ends, total = one.signal.ends, len(one.text.encode())
    inner, inner_ends = tokenizer.encode(prompt)
    assert ends[: len(inner) + 1].tolist() == [0, *inner_ends]
    assert ends[-1] == total


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_beyond_the_tokenizer_is_written_or_kept(name: str, temperature: float, tmp_path: Path) -> None:
    """Vocabularies are often padded, for speed, beyond their tokenizer's."""
    plain, tokenizer = open_model(pico(name, tmp_path / "plain")), Tokenizer(open_tokenizer(tmp_path / "plain"))
    wide = open_model(pad_vocabulary(pico(name, tmp_path / "wide")))
    assert wide.config.vocab_size == len(tokenizer.table) + 8
    with torch.inference_mode():
        assert int(wide(torch.tensor([[0]])).logits[0, 0].argmax()) >= len(tokenizer.table)
    told = [written(model, tokenizer, PROMPTS, temperature=temperature) for model in (plain, wide)]
    for one, other in zip(*told, strict=True):
        assert one.text == other.text
        np.testing.assert_array_equal(one.signal.ids, other.signal.ids)
        np.testing.assert_array_equal(one.signal.topk_ids, other.signal.topk_ids)
        np.testing.assert_allclose(one.signal.logprobs, other.signal.logprobs, atol=1e-4)
    signals = {str(n): one.signal for n, one in enumerate(told[0])}
    gains = [with_gain(signals, model, tokenizer) for model in (plain, wide)]
    for name in signals:
        np.testing.assert_allclose(gains[0][name].gain, gains[1][name].gain, atol=1e-3)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(*(prompt_nats(model, tokenizer, TEXTS) for model in (plain, wide)), rtol=1e-4)


# ── how much was learned in private ───────────────────────────────────────────────────────────────────────────────────


def test_gain_is_what_the_writer_finds_likelier_than_its_ancestor(tmp_path: Path) -> None:
    model, tokenizer = opened("gpt2", tmp_path / "writer")
    ancestor, _ = opened("gpt2", tmp_path / "ancestor", seed=1)
    made = written(model, tokenizer, PROMPTS, temperature=1.0)
    signals = {f"d{n}": one.signal for n, one in enumerate(made)}
    found = with_gain(signals, ancestor, tokenizer, batch=3)
    assert list(found) == list(signals)
    for prompt, (name, signal) in zip(PROMPTS, found.items(), strict=True):
        head = 1 + len(tokenizer.encode(prompt)[0])
        ids = torch.from_numpy(signal.ids.astype(np.int64))
        with torch.inference_mode():
            before = torch.log_softmax(ancestor(ids[None]).logits[0], -1)[head - 1 : -1].gather(1, ids[head:, None])
        assert signal.gain is not None
        expected = np.maximum(signal.logprobs[head:] - before[:, 0].numpy(), 0)
        np.testing.assert_allclose(signal.gain[head:], expected, atol=1e-2)
        assert not signal.gain[:head].any()  # what was given to it was not its own
        assert signal.ids is signals[name].ids
    assert with_gain({}, ancestor, tokenizer) == {}


def test_what_the_ancestor_thought_is_kept_on_demand(tmp_path: Path) -> None:
    model, tokenizer = opened("gpt2", tmp_path / "writer")
    ancestor, _ = opened("gpt2", tmp_path / "ancestor", seed=1)
    signals = {str(n): one.signal for n, one in enumerate(written(model, tokenizer, PROMPTS, temperature=1.0))}
    plain = with_gain(signals, ancestor, tokenizer, batch=3)
    found = with_gain(signals, ancestor, tokenizer, batch=3, keep_before=True)
    assert list(found) == list(signals)
    for name, told in found.items():
        np.testing.assert_array_equal(told.gain, plain[name].gain)  # pyright: ignore[reportArgumentType]
        assert (plain[name].before, plain[name].before_topk) == (None, None)
        assert told.before is not None
        assert told.before_topk is not None
        ids = torch.from_numpy(told.ids.astype(np.int64))
        with torch.inference_mode():
            log_p = torch.log_softmax(ancestor(ids[None]).logits[0, :-1], -1)
        kept = log_p.gather(1, torch.from_numpy(told.topk_ids[1:].astype(np.int64)))
        np.testing.assert_allclose(told.before[1:], log_p.gather(1, ids[1:, None])[:, 0], atol=1e-4)
        np.testing.assert_allclose(told.before_topk[1:], kept, atol=2e-2)
        assert (told.before.dtype, told.before_topk.dtype) == (np.float32, np.float16)
        assert told.before[0] == 0
        assert not told.before_topk[0].any()


# ── how much at home ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_nats_are_those_of_each_prompt_alone(name: str, tmp_path: Path) -> None:
    model, tokenizer = opened(name, tmp_path)
    if name == "gemma3_text":
        model.config.final_logit_softcapping = 2.0
    prompts = [*TEXTS, "W", "Who is 🙂?"]
    nats = prompt_nats(model, tokenizer, prompts, batch=4)
    for prompt, found in zip(prompts, nats, strict=True):
        ids = torch.tensor([[tokenizer.start, *tokenizer.encode(prompt)[0]]])
        with torch.inference_mode():
            log_p = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])
        assert found == pytest.approx(-float(log_p.sum()) / len(prompt.encode()), rel=1e-4)


def test_of_a_long_prompt_the_end_counts(tmp_path: Path) -> None:
    model, tokenizer = opened("gpt2", tmp_path, context=16)
    long = "The quick brown fox jumps over the lazy dog. " * 3
    nats = prompt_nats(model, tokenizer, [long, "W", ""])
    assert np.isfinite(nats).all()
    inner, ends = tokenizer.encode(long)
    ids = torch.tensor([[tokenizer.start, *inner[-15:]]])
    with torch.inference_mode():
        log_p = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])
    assert nats[0] == pytest.approx(-float(log_p.sum()) / (ends[-1] - ends[-16]), rel=1e-4)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_large_vocabularies_come_in_blocks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows and tokens there are, no more logits exist at a time than the limit; nothing else changes."""
    model, tokenizer = opened(name, tmp_path / "writer")
    ancestor, _ = opened(name, tmp_path / "ancestor", seed=1)
    prompts = [*TEXTS, "W", "", "Who is 🙂?"]
    signals = {str(n): one.signal for n, one in enumerate(written(model, tokenizer, prompts, temperature=1.0))}
    sizes: list[int] = []
    for one in (model, ancestor):
        one.get_output_embeddings().register_forward_hook(lambda _m, _i, output: sizes.append(output.numel()))  # pyright: ignore[reportOptionalMemberAccess]
    results: list[tuple[np.ndarray, list[np.ndarray]]] = []
    whole = 0
    for limit in (2**26, 20_000):
        monkeypatch.setattr("deepfusion.writing.LOGITS_AT_ONCE", limit)
        nats = prompt_nats(model, tokenizer, prompts, batch=8)
        gains = with_gain(signals, ancestor, tokenizer, batch=8)
        results.append((nats, [np.asarray(signal.gain) for signal in gains.values()]))
        assert max(sizes) <= limit
        whole = whole or max(sizes)
        sizes.clear()
    assert whole > 5 * 20_000
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)


def test_one_position_of_many_rows_is_the_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = opened("llama", tmp_path)
    expected = prompt_nats(model, tokenizer, TEXTS)
    monkeypatch.setattr("deepfusion.writing.LOGITS_AT_ONCE", 1)
    np.testing.assert_allclose(prompt_nats(model, tokenizer, TEXTS), expected, rtol=1e-5)


# ── thinning a batch ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_have_ended_can_leave_the_batch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = opened(name, tmp_path)
    prompts = (PROMPTS[0], PROMPTS[2], PROMPTS[0], PROMPTS[0])
    unthinned = written(model, tokenizer, prompts)
    first, other = (new_tokens(unthinned[row], prompts[row], tokenizer) for row in (0, 1))
    # Three rows end at the first of their greedy tokens that the other row does not write.
    tokenizer.end = next(token for token in first if token not in other)
    whole = written(model, tokenizer, prompts)
    sizes: list[int] = []
    forward = writing._last_logits
    monkeypatch.setattr(writing, "THINNED", 0)
    monkeypatch.setattr(
        writing, "_last_logits", lambda m, step, *rest: sizes.append(len(step)) or forward(m, step, *rest)
    )
    for thinned, one in zip(written(model, tokenizer, prompts), whole, strict=True):
        assert (thinned.text, thinned.finished) == (one.text, one.finished)
        assert np.array_equal(thinned.signal.ids, one.signal.ids)
        assert np.allclose(thinned.signal.logprobs, one.signal.logprobs, atol=1e-4)
        assert np.array_equal(thinned.signal.topk_ids, one.signal.topk_ids)
    assert sizes[0] == 4
    assert sizes[-1] == 1


# ── drawing from many tokens ──────────────────────────────────────────────────────────────────────────────────────────


def test_one_number_draws_as_often_as_probable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfusion.writing.MANY_TOKENS", 3)
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0]).expand(40_000, 6)
    tokens = drawn(probabilities, torch.Generator().manual_seed(0))
    assert tokens.shape == (40_000, 1)
    share = torch.bincount(tokens[:, 0], minlength=6) / 40_000
    assert share[[0, 2, 5]].tolist() == [0, 0, 0]
    assert torch.allclose(share, probabilities[0], atol=0.01)


def test_a_small_vocabulary_is_drawn_from_by_torch() -> None:
    probabilities = torch.rand(5, 7).softmax(-1)
    tokens = drawn(probabilities, torch.Generator().manual_seed(0))
    assert torch.equal(tokens, torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(0)))
