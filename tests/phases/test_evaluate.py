import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from deepfusion.config import EvaluatePhase, Runtime
from deepfusion.data.documents import Question, ScoredQuestion, read_jsonl, write_jsonl
from deepfusion.phases.evaluate import cut, evaluate
from deepfusion.routing import RoutingTally, mean_distance, routers, without_experts
from deepfusion.scoring import Piece, batches, score

RUNTIME = Runtime(workers=0)
SHAPE = {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}
QUESTIONS = [
    Question(id="a", domain="law", prompt="Who? ", answer="Ann", private=True, options=("Ann", "Bo"), answer_idx=0),
    Question(id="b", domain="food", prompt="What is eaten? ", answer="½ soup", options=("x", "½ soup"), answer_idx=1),
    Question(id="c", domain="law", answer="plain text"),
    Question(id="d", domain="food", prompt="long " * 12, answer="end", private=True),
]


def byte_tokenizer(folder: Path) -> None:
    """One token a byte, ids in the order of the alphabet, except that a space takes the next letter with it: ' A'."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"ĠA": 256, "<eos>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "A")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.5)).save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_local_experts=3, num_experts_per_tok=2, initializer_range=0.5)
    MixtralForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


def run(model: Path, folder: Path, questions: list[Question], name: str, **options: object):
    into = folder / name
    into.mkdir()
    write_jsonl(folder / "test.jsonl", questions)
    config = EvaluatePhase(
        batch_tokens=int(options.pop("batch_tokens", 64)), removal=bool(options.pop("removal", True))
    )
    scores = evaluate(
        model, folder / "test.jsonl", config, system="base", item=None, into=into, runtime=RUNTIME, **options
    )
    return scores, list(read_jsonl(into / "rows.jsonl", ScoredQuestion))


def slowly(model: Path, prompt: str, answer: str, context: int = 40) -> tuple[float, float, int, int, int]:
    """One text at a time, token by token from the bytes: (prompt nats, answer nats, tokens, hits, prompt bytes)."""
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelling = {bytes([b]): alphabet.index(c) for b, c in _bytes_to_unicode().items()}
    text, tokens, at = (prompt + answer).encode(), [], 0
    while at < len(text):
        width = 2 if text[at : at + 2] == b" A" else 1
        tokens.append((256 if width == 2 else spelling[text[at : at + 1]], at + width, width))
        at += width
    tokens = tokens[-context:]
    ids = torch.tensor([[257] + [token for token, _, _ in tokens]])
    with torch.inference_mode():
        log_probs = network(ids[:, :-1]).logits[0].log_softmax(-1)
    nats, hits = [0.0, 0.0], 0
    answer_tokens = prompt_bytes = 0
    for position, (token, end, width) in enumerate(tokens):
        is_answer = end > len(prompt.encode())
        nats[is_answer] -= float(log_probs[position, token])
        answer_tokens += is_answer
        prompt_bytes += 0 if is_answer else width
        hits += int(is_answer and int(log_probs[position].argmax()) == token)
    return nats[0], nats[1], answer_tokens, hits, prompt_bytes


def _bytes_to_unicode() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def test_scores_equal_those_of_one_text_at_a_time(llama: Path, tmp_path: Path) -> None:
    scores, rows = run(llama, tmp_path, QUESTIONS, "out")
    assert [row.id for row in rows] == ["a", "b", "c", "d"]
    for question, row in zip(QUESTIONS, rows, strict=True):
        prompt_nats, answer_nats, tokens, hits, prompt_bytes = slowly(llama, question.prompt, question.answer)
        assert row.prompt_nats == pytest.approx(prompt_nats, abs=1e-4)
        assert row.answer_nats == pytest.approx(answer_nats, abs=1e-4)
        assert (row.answer_tokens, row.correct_tokens, row.prompt_bytes) == (tokens, hits, prompt_bytes)
        assert row.answer_bytes == len(question.answer.encode())
        if question.options:
            costs = [slowly(llama, question.prompt, option)[1] / len(option.encode()) for option in question.options]
            assert row.choice == costs.index(min(costs))
    assert rows[0].answer_tokens == 3  # " A" straddles the prompt's end and counts with the answer
    assert (rows[2].prompt_bytes, rows[2].answer_tokens) == (0, 10)
    assert rows[3].prompt_bytes == 37  # 40 tokens of context, 3 of them the answer's
    assert scores.digest


def test_the_size_of_a_batch_does_not_matter(llama: Path, tmp_path: Path) -> None:
    _, together = run(llama, tmp_path, QUESTIONS, "together", batch_tokens=4096)
    _, alone = run(llama, tmp_path, QUESTIONS, "alone", batch_tokens=64)
    for one, other in zip(together, alone, strict=True):
        assert one.answer_nats == pytest.approx(other.answer_nats, abs=1e-4)
        assert one.choice == other.choice


def test_two_runs_give_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    assert run(llama, tmp_path, QUESTIONS, "one")[0].digest == run(llama, tmp_path, QUESTIONS, "two")[0].digest


def test_answers_that_cannot_be_scored_are_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="question 'big' has 41 tokens but the model's context is 40"):
        run(llama, tmp_path, [Question(id="big", domain="law", prompt="p", answer="x" * 41)], "long")
    with pytest.raises(ValueError, match=r"answer of test question 'plain' has 60 tokens .* \(shorter paragraphs\)"):
        cut(Question(id="plain", domain="x", answer="A" * 60), list(range(60)), list(range(1, 61)), 40)
    with pytest.raises(ValueError, match="question 'none' has an empty answer"):
        run(llama, tmp_path, [Question(id="none", domain="law", prompt="p", answer="")], "empty")
    with pytest.raises(ValueError, match="holds no question"):
        run(llama, tmp_path, [], "nothing")


def test_cutting_takes_from_the_left_of_the_prompt() -> None:
    question = Question(id="a", domain="law", prompt="abcd", answer="xy")
    assert cut(question, [1, 2, 3, 4], [2, 4, 5, 6], None) == Piece((1, 2, 3, 4), 2, 4)
    assert cut(question, [1, 2, 3, 4], [2, 4, 5, 6], 3) == Piece((2, 3, 4), 1, 2)
    assert cut(question, [1, 2, 3, 4], [2, 4, 5, 6], 2) == Piece((3, 4), 0, 0)


def test_batches_group_by_length() -> None:
    assert list(batches([2, 5, 3, 1, 9], 6)) == [[4], [1], [2, 0], [3]]


def test_routing_is_watched(mixtral: Path, tmp_path: Path) -> None:
    scores, rows = run(mixtral, tmp_path, QUESTIONS[:3], "moe", routing=True)
    routing = scores.routing
    assert routing is not None
    json.dumps(routing)
    assert routing["domains"] == ["food", "law"]
    assert routing["tokens"] == {"food": 22, "law": 17}  # a token each, but " A" for two bytes, in a; c has no prompt
    for domain in routing["domains"]:
        assert [sum(layer) for layer in routing["probabilities"][domain]] == pytest.approx([1.0, 1.0])
    for layer in range(2):
        assert sum(routing["load"][layer]) == pytest.approx(1.0)
        assert sum(routing["used"][layer]) == pytest.approx(2.0)  # top-2
    assert all(information >= 0 for information in routing["mutual_information"]["layers"])
    assert len(routing["expert_difference"]["layers"]) == 2
    plain, same = run(mixtral, tmp_path, QUESTIONS[:3], "again")
    assert plain.routing is None
    assert rows == same


def test_removal_is_the_change_without_the_expert(mixtral: Path, tmp_path: Path) -> None:
    scores, rows = run(mixtral, tmp_path, [QUESTIONS[2]], "moe", routing=True)
    assert scores.routing is not None
    network = MixtralForCausalLM.from_pretrained(mixtral)
    # The same by other means: routers that are rewritten rather than hooked.
    for router in routers(network):
        kept = router.forward

        def forward(hidden, router=router, kept=kept):
            logits = kept(hidden)[0]
            logits[:, 1] = -1e30
            top, index = logits.softmax(-1).topk(2)
            return logits, top / top.sum(-1, keepdim=True), index

        router.forward = forward
    piece = Piece(tuple(_ids(mixtral, QUESTIONS[2].answer)), 0, 0)
    (after,) = score(network, [piece], 257, 64)
    (change,) = (r for r in scores.routing["removal"] if r["expert"] == 1 and r["domain"] == "law")
    assert change["nats_per_token"] == pytest.approx((after.answer_nats - rows[0].answer_nats) / 10, abs=1e-5)
    assert change["token_accuracy"] == pytest.approx((after.correct_tokens - rows[0].correct_tokens) / 10)


def test_removal_can_be_left_out(mixtral: Path, tmp_path: Path) -> None:
    (whole, rows), (less, same) = (
        run(mixtral, tmp_path, QUESTIONS, f"moe-{removal}", routing=True, removal=removal) for removal in (True, False)
    )
    assert whole.routing is not None
    assert whole.routing["removal"]
    assert less.routing == {**whole.routing, "removal": []}
    assert rows == same


def _ids(model: Path, text: str) -> list[int]:
    return PreTrainedTokenizerFast.from_pretrained(model)(text)["input_ids"]


@pytest.mark.parametrize("normalised", [True, False])
def test_a_removed_expert_is_never_used_and_the_model_is_restored(normalised: bool) -> None:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SHAPE,
        num_experts=3,
        num_experts_per_tok=1,
        norm_topk_prob=normalised,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        initializer_range=0.5,
    )
    network = Qwen2MoeForCausalLM(config).eval()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        before = network(ids).logits
        with without_experts(network, [0]):
            for router in routers(network):
                _, weights, chosen = router(torch.randn(50, 16))
                assert not (chosen == 0).any()
                assert bool((weights == 1).all()) == normalised
            assert not torch.equal(network(ids).logits, before)
        assert torch.equal(network(ids).logits, before)


def test_a_dense_model_has_no_routing(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no router"):
        run(llama, tmp_path, QUESTIONS, "dense", routing=True)


def test_the_tally_by_hand() -> None:
    tally = RoutingTally(1, ["law", "food", "none"], 2)
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [9.0, 9.0]])
    # Unnormalised gate weights; the third token is padding.
    tally.add([(logits, torch.tensor([[0.5], [0.2], [0.9]]), torch.tensor([[0], [1], [0]]))], torch.tensor([0, 1, -1]))
    facts = tally.summary()
    assert facts["domains"] == ["law", "food"]
    assert facts["probabilities"]["food"][0] == pytest.approx([0.75, 0.25])
    assert facts["mutual_information"]["mean"] == pytest.approx(math.log(2))
    assert facts["load"] == [[0.5, 0.5]]
    assert facts["dead"] == []


def test_distance_between_experts_by_hand() -> None:
    # Rows (3, 4) and (0, 0): distance 5, mean norm 2.5.
    assert mean_distance([torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [0.0]])]) == pytest.approx(2.0)
    assert mean_distance([torch.ones(3, 2)]) == 0.0
    assert mean_distance([torch.ones(1, 2)]) == 0.0


def test_what_is_known_is_not_measured_again(llama: Path, tmp_path: Path) -> None:
    first, rows = run(llama, tmp_path, QUESTIONS, "first")
    into = tmp_path / "again"
    into.mkdir()
    again = evaluate(  # there is no model to measure
        tmp_path, tmp_path, EvaluatePhase(), system="proxy", item="a", into=into, runtime=RUNTIME, known=first
    )
    assert list(read_jsonl(into / "rows.jsonl", ScoredQuestion)) == rows
    assert (again.system, again.item, again.work.tokens) == ("proxy", "a", 0)
