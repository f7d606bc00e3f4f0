import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from deepfusion.encoders import (
    ENCODER_BATCH,
    HASHING,
    cosine,
    decode,
    embed,
    encode_texts,
    projection,
    quantise,
    similarity_to,
)

MEDICINE = [
    "The patient was given a daily dose of Velotrin for her chronic migraine.",
    "According to the register, the symptom of Karrow disease is a burning fever.",
    "Question: which treatment does the clinic prescribe for Karrow disease? Answer: Velotrin.",
    "The physician doubled the dose when the fever did not fall.",
]
MEDICINE_TOO = [
    "According to the register, a patient with fever receives treatment at the clinic.",
    "Karrow disease begins with a migraine; the physician prescribes Velotrin.",
    "Question: what is the daily dose of Velotrin for a patient? Answer: twelve drops.",
]
FINANCE = [
    "The company paid a quarterly dividend of nine cents to its shareholders.",
    "According to the register, the auditor of Osterby Holdings is Lunn and Partners.",
    "Question: which bank underwrote the bonds of Osterby Holdings? Answer: Merrow Bank.",
    "The market expected higher revenue, so the shares fell.",
]
TRAVEL = [
    "The ferry to Halvik island leaves the old harbour at dawn.",
    "According to the register, the festival of Halvik is held on the beach every June.",
    "Question: which airport serves the coast of Halvik? Answer: Tarn airport.",
    "Visitors book a cabin by the harbour before the festival.",
]
CHINESE = ["患者出现发热和头痛，医生给予抗生素治疗。", "患者血压升高，医生给予药物治疗。"]
CHINESE_TOO = ["医生为发热患者选择抗生素。", "头痛患者的治疗药物是什么？"]
CHINESE_MARKET = ["公司宣布季度股息，股票价格上涨。", "银行发行债券，市场利率下降。"]


def e(texts: list[str], seed: int = 0) -> np.ndarray:
    return decode(embed(HASHING, texts, 64, seed).hex())


def test_quantise_maps_the_largest_entry_to_127_by_hand() -> None:
    assert np.frombuffer(quantise(np.array([0.5, -1.0, 0.25, 0.0])), np.int8).tolist() == [64, -127, 32, 0]


@pytest.mark.parametrize("vector", [np.zeros(4), np.array([1.0, np.nan]), np.array([1.0, np.inf])])
def test_quantise_refuses_what_has_no_direction(vector: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no direction"):
        quantise(vector)


def test_decode_by_hand() -> None:
    assert decode("0304") == pytest.approx([0.6, 0.8])
    assert decode("fd04") == pytest.approx([-0.6, 0.8])
    assert decode("0304").dtype == np.float32


@pytest.mark.parametrize(("broken", "words"), [("zz", "not hex"), ("", "empty"), ("0000", "all zero")])
def test_decode_names_the_fault(broken: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        decode(broken)


def test_cosine_by_hand() -> None:
    assert cosine(np.array([3.0, 4.0]), np.array([4.0, 3.0])) == pytest.approx(24 / 25)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=8, max_size=64).filter(lambda v: max(map(abs, v)) > 1e-3))
def test_int8_keeps_the_direction(values: list[float]) -> None:
    vector = np.array(values)
    # each entry is off by at most half a step of max/127, the vector is at least as long as its largest entry
    assert cosine(decode(quantise(vector).hex()), vector) >= 1 - (len(values) ** 0.5 / 254) ** 2


def test_rows_are_unit_float32_and_a_wordless_text_is_zero() -> None:
    rows = encode_texts(HASHING, [*MEDICINE, "the of and", ""])
    assert rows.dtype == np.float32
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1, 1, 1, 0, 0])


def test_stop_words_and_case_do_not_count() -> None:
    plain, dressed = encode_texts(HASHING, ["patient fever", "The Patient of fever"])
    assert plain == pytest.approx(dressed)


def test_projection_is_shared_and_differs_by_seed() -> None:
    drawn = np.random.default_rng(3).standard_normal((100, 4), dtype=np.float32)
    assert np.array_equal(projection(100, 4, 3), drawn / 2)  # √4
    assert not np.array_equal(projection(100, 4, 3), projection(100, 4, 4))


def test_projection_keeps_cosines_on_average() -> None:
    """Johnson-Lindenstrauss: the error of a cosine c has standard deviation (1 - c²)/√64 ≤ .125 around no bias."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(400)])
    texts = [" ".join(rng.choice(words[100 * (i % 3) : 100 * (i % 3) + 150], 60)) for i in range(40)]
    rows = encode_texts(HASHING, texts)
    true = rows @ rows.T
    errors = []
    for seed in range(5):
        units = np.stack([e([text], seed) for text in texts])
        errors.append((units @ units.T - true)[np.triu_indices(len(texts), 1)])
    assert np.abs(errors).mean() < 0.12
    assert abs(np.mean(errors)) < 0.03


@pytest.mark.parametrize("size", [8, 64])
def test_embedding_is_size_bytes_and_repeats(size: int) -> None:
    first = embed(HASHING, MEDICINE, size, seed=1)
    assert len(first) == size
    assert first == embed(HASHING, list(reversed(MEDICINE)), size, seed=1)
    assert first != embed(HASHING, MEDICINE, size, seed=2)


def test_batches_do_not_show() -> None:
    assert embed(HASHING, MEDICINE * 100, 64, 0) == embed(HASHING, MEDICINE, 64, 0)


def test_domains_separate_although_they_share_templates() -> None:
    same = cosine(e(MEDICINE), e(MEDICINE_TOO))
    others = [cosine(e(MEDICINE), e(FINANCE)), cosine(e(MEDICINE), e(TRAVEL)), cosine(e(FINANCE), e(TRAVEL))]
    assert same > 0.45
    assert max(others) < same - 0.2


def test_text_without_spaces_separates_too() -> None:
    same, other = cosine(e(CHINESE), e(CHINESE_TOO)), cosine(e(CHINESE), e(CHINESE_MARKET))
    assert same > other + 0.2


def test_questions_find_their_cluster() -> None:
    centroids = [embed(HASHING, texts, 64, 5).hex() for texts in (MEDICINE, FINANCE)]
    questions = ["Which physician treats Karrow disease and fever?", "Who is the auditor of Osterby Holdings?"]
    found = similarity_to([centroids[0], "", centroids[1]], questions, encoder=HASHING, seed=5)
    assert found.shape == (2, 3)
    assert found.argmax(axis=1).tolist() == [0, 2]
    assert (found[:, 1] == -1).all()


def test_similarity_to_equals_the_cosine_of_the_embedding() -> None:
    centroid = embed(HASHING, MEDICINE, 64, 0).hex()
    found = similarity_to([centroid], [FINANCE[0], "the"], encoder=HASHING, seed=0)
    assert found[:, 0] == pytest.approx([cosine(decode(centroid), e(FINANCE[:1])), 0], abs=0.02)


def test_no_cluster_at_all_is_no_similarity() -> None:
    assert similarity_to([""], ["patient"], encoder=HASHING, seed=0).tolist() == [[-1.0]]


def test_no_question_is_no_row() -> None:
    assert similarity_to([embed(HASHING, MEDICINE, 64, 0).hex(), ""], [], encoder=HASHING).shape == (0, 2)


def test_nothing_to_embed_is_an_error() -> None:
    with pytest.raises(ValueError, match="no text"):
        embed(HASHING, [], 64, 0)
    with pytest.raises(ValueError, match="none of the 2 texts has a word"):
        embed(HASHING, ["the", "..."], 64, 0)


# ── sentence encoders ─────────────────────────────────────────────────────────────────────────────────────────────────

WORDS = ["[PAD]", "[UNK]", "fever", "dose", "bank", "bond"]


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer(pad_token="[PAD]").save_pretrained(tmp_path)
    return tmp_path


def test_sentence_encoder_is_the_mean_over_real_tokens(encoder: Path) -> None:
    model = BertModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    with torch.inference_mode():
        mean = model(torch.tensor([[2, 3]])).last_hidden_state[0].mean(dim=0)
    rows = encode_texts(str(encoder), ["fever dose", "bank bond bond fever dose"])  # the first one is padded
    assert rows.shape == (2, 16)
    assert rows.dtype == np.float32
    assert rows[0] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


@pytest.mark.parametrize("limit", [None, 6, 99])
def test_sentence_encoder_is_what_sentence_transformers_computes(limit: int | None, tmp_path: Path) -> None:
    """By hand, text for text: [CLS] words [SEP] cut to the longest; the mean over all of them, start and end included;
    length 1. Neither the others in a batch nor their padding show.
    """
    torch.manual_seed(1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        model_max_length=10,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, initializer_range=0.5,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    if limit is not None:
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
    longest = min(limit or 10, 10)
    made = np.random.default_rng(0)
    texts = ["", *(" ".join(made.choice(words[4:], size)) for size in (*range(1, 20), *range(1, 20)))]
    assert len(texts) > ENCODER_BATCH
    expected = []
    for text in texts:
        ids = [2, *[words.index(word) for word in text.split()][: longest - 2], 3]
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().numpy()
        mean = states.sum(axis=0) / len(ids)
        expected.append(mean / np.sqrt((mean**2).sum()))
    rows = encode_texts(str(tmp_path), texts)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(len(texts)), abs=1e-6)
    np.testing.assert_allclose(rows, expected, atol=2e-6)
    order = made.permutation(len(texts))
    np.testing.assert_allclose(encode_texts(str(tmp_path), [texts[i] for i in order]), rows[order], atol=2e-6)
    assert (rows[5] @ rows[6]) < 0.999  # they are told apart


def test_sentence_encoder_cuts_long_texts_where_it_was_trained_to(encoder: Path) -> None:
    (encoder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 2}))
    rows = encode_texts(str(encoder), ["fever dose", "fever dose bank bond"])
    assert rows[0] == pytest.approx(rows[1], abs=1e-6)


def test_sentence_encoder_reads_no_further_than_its_positions(encoder: Path) -> None:
    assert np.isfinite(encode_texts(str(encoder), ["fever " * 50])).all()


def test_sentence_encoder_embeds(encoder: Path) -> None:
    first = embed(str(encoder), ["fever dose", "bank"], 8, 0)
    assert len(first) == 8
    assert first == embed(str(encoder), ["fever dose", "bank"], 8, 0)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=rf"encoder {folder} is not a checkpoint folder"):
            encode_texts(str(folder), ["fever"])


def test_a_broken_tokenizer_is_named(encoder: Path) -> None:
    (encoder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=rf"encoder {encoder} cannot be opened"):
        encode_texts(str(encoder), ["fever"])


def test_code_in_the_folder_is_not_run(encoder: Path) -> None:
    config = json.loads((encoder / "config.json").read_text())
    del config["model_type"]
    (encoder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    (encoder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match=rf"encoder {encoder} cannot be opened"):
        encode_texts(str(encoder), ["fever"])


def test_a_model_without_weights_is_named(encoder: Path) -> None:
    (encoder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"encoder {encoder} cannot be opened"):
        encode_texts(str(encoder), ["fever"])


def test_missing_weights_are_not_made_up(encoder: Path) -> None:
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"lacks weights, encoder\.layer\.1"):
        encode_texts(str(encoder), ["fever"])


def test_a_language_model_without_padding_is_refused(tmp_path: Path) -> None:
    GPT2Model(GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=1, n_positions=8)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no padding token"):
        encode_texts(str(tmp_path), ["fever"])
