from functools import cache
from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from deepfusion.alignment import chunks, encode, end_id, patch_bounds, patch_membership, start_id, vocabulary_bytes
from kinds import KINDS, byte_level, llama_style, text, unigram, wrap

table_of = cache(lambda kind: vocabulary_bytes(KINDS[kind]()))


def spelling(kind: str, index: int) -> bytes:
    return table_of(kind)[index] or KINDS[kind]().convert_ids_to_tokens(index).encode()


def spell(kind: str, ids: list[int]) -> bytes:
    return b"".join(spelling(kind, index) for index in ids)


# ── vocabularies ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_byte_level_vocabulary():
    tokenizer, table = byte_level(), table_of("byte-level")
    vocabulary = tokenizer.get_vocab()
    assert len(table) == len(tokenizer)
    assert table[vocabulary["Ġ"]] == b" "
    assert table[vocabulary["Ċ"]] == b"\n"
    assert table[vocabulary["    "]] == b"    "
    assert table[vocabulary["<|end|>"]] == b""
    assert set(range(256)) <= {entry[0] for entry in table if len(entry) == 1}


def test_sentencepiece_vocabulary():
    vocabulary, table = llama_style().get_vocab(), table_of("llama")
    assert table[vocabulary["▁"]] == b" "
    assert table[vocabulary["<0xF0>"]] == b"\xf0"
    assert table[vocabulary["</s>"]] == b""


def test_other_tokenizers_are_refused():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"decodes by \['WordPiece'\]"):
        vocabulary_bytes(wrap(tokenizer))


def test_start_and_end():
    assert start_id(llama_style()) == llama_style().bos_token_id
    assert end_id(llama_style()) == llama_style().eos_token_id
    assert start_id(byte_level()) == end_id(byte_level()) == byte_level().eos_token_id
    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        start_id(wrap(Tokenizer(models.BPE())))


# ── spans ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(text=text)
@example(text="")
@example(text=" ")
@example(text="  the  dog\n the dog ½ 🙂")
@example(text="▁▁ the ▁dog")
@example(text="the <s>dog</s> <|end|> <unk>")
@example(text="the     dog      \r\n")
def test_tokens_spell_any_text(kind: str, text: str):
    tokenizer = KINDS[kind]()
    ids, ends = encode(tokenizer, text, table_of(kind))
    content = text.encode()
    assert len(ids) == len(ends)
    assert list(accumulate(ends, max)) == ends
    assert (ends[-1] if ends else 0) == len(content)
    spelt, dummy = spell(kind, ids), len(spell(kind, ids)) - len(text.replace("▁", " ").encode())
    if "▁" not in text or kind.startswith("byte"):
        assert spelt[len(spelt) - len(content) :] == content
        for index, start, end in zip(ids[1:], ends, ends[1:], strict=False):
            assert content[start:end] == spelling(kind, index)
    else:
        assert dummy in (0, 1)


def test_a_dummy_space_belongs_to_no_byte():
    tokenizer = unigram()
    ids, ends = encode(tokenizer, "the dog", table_of("unigram"))
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁the", "▁dog"]
    assert ends == [3, 7]


def test_a_spelt_out_byte():
    ids, _ = encode(llama_style(), "<0x41>", table_of("llama"))
    assert spell("llama", ids) == b" <0x41>"
    with pytest.raises(ValueError, match="byte 0 differs"):  # this kind takes it for the byte itself
        encode(unigram("never"), "<0x41>", table_of("unigram, never"))


def test_one_character_in_several_tokens():
    _, ends = encode(unigram(), "½a", table_of("unigram"))
    assert ends == [0, 1, 2, 3]  # the dummy space, C2, BD, a


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Lowercase()])
def test_normalising_tokenizers_are_refused(normalizer: normalizers.Normalizer):
    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    backend.normalizer = normalizer
    tokenizer = wrap(backend, eos_token="<|end|>")
    tokenizer.name_or_path = "folder/model"
    table = vocabulary_bytes(tokenizer)
    assert encode(tokenizer, "plain", table)[1][-1] == 5
    with pytest.raises(ValueError, match="tokenizer folder/model does not spell this text: byte 3 differs"):
        encode(tokenizer, "abcﬃ" if isinstance(normalizer, normalizers.NFKC) else "abcD", table)


def test_the_differing_byte_counts_literal_underlines():
    tokenizer = Tokenizer.from_str(unigram().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="byte 4 differs"):
        encode(wrap(tokenizer), "▁aB", table_of("unigram"))


def test_unpaired_surrogates_are_refused():
    with pytest.raises(ValueError, match="unpaired surrogate at character 2"):
        encode(byte_level(), "ab\ud800", table_of("byte-level"))


def test_chunks_by_hand():
    #     a: th|e| d|og    b: the| |do|g
    assert chunks([2, 3, 5, 7], [3, 4, 6, 7]) == [(0, 2, 0, 1), (2, 4, 1, 4)]
    assert chunks([0, 3], [3]) == [(0, 2, 0, 1)]
    assert chunks([0, 3], [0, 3]) == [(0, 2, 0, 2)]
    assert chunks([], []) == []
    with pytest.raises(ValueError, match="ends at byte 3 or 4"):
        chunks([3], [4])


@settings(deadline=None, max_examples=100)
@given(text=text, kinds=st.tuples(st.sampled_from(list(KINDS)), st.sampled_from(list(KINDS))))
def test_chunks_reassemble_the_text(text: str, kinds: tuple[str, str]):
    ends = [encode(KINDS[kind](), text, table_of(kind))[1] for kind in kinds]
    groups = chunks(*ends)
    content = text.encode()
    for side, side_ends in enumerate(ends):
        bounds = [0, *(side_ends[group[2 * side + 1] - 1] for group in groups)]
        assert b"".join(content[a:b] for a, b in pairwise(bounds)) == content
        assert all(a < b for a, b in pairwise(bounds))
        froms, tos = [group[2 * side] for group in groups], [group[2 * side + 1] for group in groups]
        assert [*froms, len(side_ends)] == [0, *tos] or not content
    assert [ends[0][g[1] - 1] for g in groups] == [ends[1][g[3] - 1] for g in groups]
    assert len(groups) == len((set(ends[0]) & set(ends[1])) - {0})  # no group can be cut further


# ── patches ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_patches_by_hand():
    assert patch_bounds(8, 2) == [(0, 4), (4, 8)]
    assert patch_bounds(3, 2) == [(0, 2), (1, 3)]
    assert patch_bounds(1, 2) == [(0, 1), (0, 1)]
    assert patch_membership([3, 3, 5, 8], 8, 2) == [(0, 0), (2, 0), (2, 1), (3, 1)]
    assert patch_membership([1], 1, 2) == [(0, 0), (0, 1)]
    assert patch_membership([], 0, 2) == []


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 9))
def test_patches_cover_what_they_touch(widths: list[int], patches: int):
    ends = list(accumulate(widths))
    total = ends[-1] if ends else 0
    bounds = patch_bounds(total, patches)
    expected = [
        (token, patch)
        for token, (end, width) in enumerate(zip(ends, widths, strict=True))
        for patch, (start, stop) in enumerate(bounds)
        if end - width < stop and start < end and width
    ]
    found = patch_membership(ends, total, patches)
    assert found == expected
    assert not total or {patch for _, patch in found} == set(range(patches))
