"""Tokenizers of every kind that models come with, and text that is hard for them."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog says: ½ of it!",
    "  indented\n\n\tдва слова и ещё два слова 你好世界 你好 🙂🙂 naïve café",
] * 5


def wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@cache
def byte_level(add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    return wrap(tokenizer, eos_token="<|end|>")


FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def llama_style() -> PreTrainedTokenizerFast:
    """As in Llama 2: a dummy space, ▁ by the normaliser, bytes for unknown characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    trained.train_from_iterator(LINES[:1], trainer)
    vocabulary = trained.get_vocab()
    tokenizer = Tokenizer(
        models.BPE(
            vocab={**vocabulary, **{token: len(vocabulary) + i for i, token in enumerate(FALLBACK)}},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def unigram(prepend: str = "always") -> PreTrainedTokenizerFast:
    words = ["▁", "▁the", "▁dog", "fox", "the", "▁▁", *"abcdefghijklmnopqrstuvwxyz", "да", "你好"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((word, -float(i)) for i, word in enumerate(words, 1))]
    pieces += [(token, -50.0) for token in FALLBACK]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return wrap(tokenizer, eos_token="</s>", unk_token="<unk>")


KINDS = {
    "byte-level": byte_level,
    "byte-level, prefix": lambda: byte_level(True),
    "llama": llama_style,
    "unigram": unigram,
    "unigram, first": lambda: unigram("first"),
    "unigram, never": lambda: unigram("never"),
}
text = st.text(
    st.one_of(st.sampled_from(list(" \n\tthe dog fox ½🙂你好да▁é<>|s/")), st.characters(exclude_categories=["Cs"])),
    max_size=40,
)
