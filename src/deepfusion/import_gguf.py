"""From a GGUF file, as llama.cpp keeps models, to a checkpoint folder that devices or students start from.

transformers reads the file and undoes its quantisation. What it passes over without a word is what this module is
about: tensors and settings that have no place in the model it makes, and the way the tokenizer cuts words.
"""

from __future__ import annotations

import io
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.utils.import_utils import is_gguf_available
from transformers.utils.quantization_config import GgufConfig

from deepfusion import checkpoints
from deepfusion.alignment import vocabulary_bytes
from deepfusion.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFReader

# The file's `general.architecture` → the model type that it becomes.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
}
# Word patterns of byte-level tokenizers by llama.cpp's names: GPT-2's own, and those that cut digits apart before it.
# transformers knows others, and takes what it does not know for GPT-2's.
GPT2_WORDS = {"gpt-2", "phi-2", "mpt", "olmo", "jais"}
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}  # layers of the 27B
# Settings that the two call alike.
_CAPS = {"gemma2.attn_logit_softcapping", "gemma2.final_logit_softcapping"}
# Settings that repeat what others say, or say nothing of the function that the weights stand for.
_WITHOUT_EFFECT = {"attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size"}


@dataclass(frozen=True)
class Imported:
    """What a GGUF file has become."""

    folder: Path
    model_type: str
    parameters: int
    vocabulary: int
    quantised: tuple[str, ...]  # how the file keeps its tensors, as Q4_K
    notes: tuple[str, ...]  # what to know of the result


def import_gguf(
    file: Path, out: Path, dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16", *, force: bool = False
) -> Imported:
    """Convert a GGUF file to a checkpoint folder: safetensors, config and tokenizer.

    `out` is there when it is whole and has been checked as any checkpoint from elsewhere, or not at all.

    Args:
        file: llama.cpp's file; one that is cut into parts must be joined first.
        out: the folder to make.
        dtype: of the weights; quantised ones have few digits, which bfloat16 holds.
        force: replace what lies at `out`.

    Raises:
        InputError: the file is none that can be converted without loss, or `out` is there already.
    """
    if not is_gguf_available():
        raise InputError("reading GGUF files needs the package gguf: pip install 'deepfusion-moe[gguf]'")
    reader, told = _read(file)
    architecture = str(told["general.architecture"])
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{file} holds a model of architecture {architecture!r}, which is not among those that can be imported: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    if out.exists() and not force:
        raise InputError(f"{out} is there already: give another folder, or --force to replace it")
    own = {key[len(architecture) + 1 :]: value for key, value in told.items() if key.startswith(f"{architecture}.")}
    notes = [*_passed_over(file, architecture, own), *_unknown_words(told)]
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _convert(file, partial, getattr(torch, dtype), told)
        _refuse_leftovers(file, reader, partial)
        try:
            checkpoints.validate(partial)
            vocabulary_bytes(checkpoints.open_tokenizer(partial))
        except ValueError as error:
            raise InputError(f"{file}: {error}".replace(f"{partial}", "the result")) from None
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes files that nobody else may read
        if out.is_dir():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Imported(
        out,
        ARCHITECTURES[architecture],
        checkpoints.parameters(out),
        len(told["tokenizer.ggml.tokens"]),
        tuple(sorted({tensor.tensor_type.name for tensor in reader.tensors})),
        tuple(notes),
    )


def _read(file: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """A GGUF file's table of tensors, and what it says of itself."""
    from gguf import GGUFReader

    if not file.is_file():
        raise InputError(f"{file} is a folder, not a file" if file.is_dir() else f"{file} does not exist")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file: it does not begin with GGUF")
    try:
        reader = GGUFReader(file)
        told = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the library reads what it finds, and trips over a cut or broken file in many ways
        raise InputError(f"{file} is broken or cut short: {' '.join(str(error).split())}") from error
    part = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", file.name)
    count = int(told.get("split.count") or (part[2] if part else 1))
    if count > 1:
        raise InputError(
            f"{file} is one of {count} parts: join them first, with llama.cpp's llama-gguf-split --merge, "
            "and import the whole"
        )
    for key in ("general.architecture", "tokenizer.ggml.tokens"):
        if key not in told:
            raise InputError(f"{file} says nothing of {key}: it is not a whole language model")
    return reader, told


def _passed_over(file: Path, architecture: str, own: Mapping[str, Any]) -> Iterator[str]:
    """Settings of the architecture that transformers does not read.

    Raises:
        InputError: one of them changes what the model computes everywhere.
    """
    known = GGUF_CONFIG_MAPPING[architecture].keys() | _WITHOUT_EFFECT
    for key, value in own.items():
        if key in known or f"{architecture}.{key}" in _CAPS:
            continue
        if key.startswith("rope.scaling.") and own.get("rope.scaling.factor", 1) != 1:
            raise InputError(
                f"{file} stretches its positions ({architecture}.{key}: {value}), which would be lost: "
                "take the model's own safetensors"
            )
        yield f"the file's {architecture}.{key} ({str(value)[:40]}) was passed over"


def _convert(file: Path, into: Path, dtype: torch.dtype, told: Mapping[str, Any]) -> None:
    """Let transformers read the file, and write what it made of it."""
    tokenizer: PreTrainedTokenizerFast
    model: PreTrainedModel
    try:
        with checkpoints.quiet(), redirect_stderr(io.StringIO()):  # a bar that no switch of transformers reaches
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
            )
    except Exception as error:  # of many kinds, over what the file says
        raise InputError(f"{file} cannot be converted: {' '.join(str(error).split())}") from error
    config = model.config
    config.name_or_path = ""  # would name a folder of this machine
    for name in ("_model_name_or_path", "unk_token_id"):
        config.__dict__.pop(name, None)
    if config.model_type in LARGEST_GEMMA:  # not in the file: llama.cpp knows it by the model's size
        largest = config.num_hidden_layers == LARGEST_GEMMA[config.model_type]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    for key in _CAPS & told.keys():
        setattr(config, key.removeprefix("gemma2."), told[key])
    _mend_words(tokenizer, told)
    checkpoints.save_model(model, tokenizer, into)


def _refuse_leftovers(file: Path, reader: GGUFReader, folder: Path) -> None:
    """Make sure that every value of the file has found a place.

    Tensors are told by their number of values, for names and layouts differ between the two.

    Raises:
        InputError: names some that have not.
    """
    given = [(tensor.name, math.prod(map(int, tensor.shape))) for tensor in reader.tensors]
    taken = Counter(math.prod(shape) for _, shape in checkpoints.shapes(folder).values())
    for size, count in Counter(size for _, size in given).items():
        if count > taken[size]:
            names = sorted({re.sub(r"^blk\.\d+\.", "", name) for name, held in given if held == size})
            raise InputError(
                f"{file} has {count} tensors of {size} values ({', '.join(names)}), and {count - taken[size]} of them "
                f"have no place in transformers' model: take the model's own safetensors"
            )


def _mend_words(tokenizer: PreTrainedTokenizerFast, told: Mapping[str, Any]) -> None:
    """Cut digits apart where the model has learned them so, which transformers does not know."""
    if told.get("tokenizer.ggml.model") == "gpt2" and told.get("tokenizer.ggml.pre") in DIGITS_APART:
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])  # pyright: ignore[reportAttributeAccessIssue]


def _unknown_words(told: Mapping[str, Any]) -> Iterator[str]:
    """A way of cutting words that is taken for GPT-2's, for nobody here knows it."""
    pattern = told.get("tokenizer.ggml.pre", "default")
    known = GPT2_WORDS | DIGITS_APART | GGUF_PRE_TOKENIZER_SPLITS.keys()
    if told.get("tokenizer.ggml.model") == "gpt2" and pattern not in known:
        yield (
            f"the file's tokenizer cuts words by the pattern {pattern!r}, for which GPT-2's was taken: compare with "
            "the model's own tokenizer.json, and put that in its place if they differ"
        )
