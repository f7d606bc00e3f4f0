"""Tiny models and tokenizers made on the spot."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from deepfusion.config import MadeModel
from deepfusion.families.registry import family

END = "<|endoftext|>"


def make_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab` entries (fewer if the text is short), trained on `texts`.

    It can write any text. `END` is its only special token: start, end and padding.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def make_model(made: MadeModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A freshly initialised float32 model for a tokenizer made here; equal arguments give equal weights.

    Raises:
        ValueError: the model type cannot have such a shape.
    """
    end = tokenizer.convert_tokens_to_ids(END)
    assert isinstance(end, int)
    config = family(made.type).config(made, len(tokenizer), end=end)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert model.generation_config is not None
    model.generation_config.pad_token_id = end
    return model.eval()
