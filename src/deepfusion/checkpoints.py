"""Hugging Face checkpoint folders: opened, saved, checked and told apart. Nothing here runs code from a folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging
from transformers.utils.import_utils import is_bitsandbytes_available

from deepfusion.artifacts import MANIFEST, RECORD, Checkpoint, Work
from deepfusion.families import family, skeleton
from deepfusion.families.make import END, make_model, make_tokenizer
from deepfusion.files import read_object
from deepfusion.weights import INDEX, Part, Stored, digest, index, shapes, stored, tensors, write

__all__ = [
    "END",
    "as_checkpoint",
    "copy_description",
    "index",
    "lineage",
    "make_model",
    "make_tokenizer",
    "open_config",
    "open_model",
    "open_tokenizer",
    "parameters",
    "save_model",
    "shapes",
    "tensors",
    "tokenizer_fingerprint",
    "trained_shapes",
    "validate",
    "write_descendant",
]

NF4_BLOCK = 64  # weights of one row that share a scale
TRAINABLE = {torch.float32, torch.float16, torch.bfloat16}
# Config fields that say how a model is run or who wrote it, not which function its weights stand for.
NOT_ARCHITECTURE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


@contextmanager
def quiet() -> Generator[None]:
    """Keep transformers from drawing bars and chatting while it reads or writes a folder; errors are raised as ever."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def open_config(folder: Path) -> PreTrainedConfig:
    """Read `config.json`.

    Raises:
        ValueError: it is missing, unreadable, or of an unsupported model type.
    """
    path = folder / "config.json"
    try:
        fields = read_object(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint: it has no config.json") from None
    family(str(fields.get("model_type")), folder)
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the fields come from elsewhere, and transformers raises many kinds of error over them
        raise ValueError(f"{path} is not a valid config: {' '.join(str(error).split())}") from error


def open_model(
    folder: Path, dtype: torch.dtype = torch.float32, accelerator: str = "cpu", *, nf4: bool = False
) -> PreTrainedModel:
    """Load a checkpoint for inference (`eval` mode), with transformers' SDPA attention where the family has it.

    Args:
        folder: of the checkpoint.
        dtype: of its weights in memory.
        accelerator: where they go.
        nf4: keep the layers' matrices in four bits (NF4) and work with them in `dtype`.

    Raises:
        ValueError: no supported checkpoint, or its tensors are not those its config asks for; or there is no
            bitsandbytes for `nf4`, or a matrix does not divide into its blocks.
    """
    config = open_config(folder)
    index(folder)
    quantised: dict[str, Any] = {}
    if nf4:
        if not is_bitsandbytes_available():
            raise ValueError("weights in four bits need bitsandbytes: pip install 'deepfusion-moe[nf4]'")
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        quantised = {"quantization_config": how, "device_map": {"": accelerator}}
    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **quantised,
        )
    model, told = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    for kind in ("missing_keys", "mismatched_keys"):
        if told[kind]:
            raise ValueError(f"{folder}: {kind.replace('_', ' ')}: {', '.join(map(str, sorted(told[kind])))}")
    if nf4:
        _check_blocks(model, folder)
        for parameter in model.parameters():  # what is left in the file's own pages would keep all of it in memory
            if parameter.is_floating_point():  # the others were made anew
                parameter.data = parameter.data.clone()
    else:
        model.to(torch.device(accelerator))  # pyright: ignore[reportArgumentType] (`wraps` hides that `to` is a method)
    return model.eval()


def _check_blocks(model: PreTrainedModel, folder: Path) -> None:
    """See that rows are whole blocks: else bitsandbytes (0.50.2, on CPUs) gives wrong weights back and says nothing.

    Raises:
        ValueError: names a matrix whose rows are no whole blocks.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for name, part in model.named_modules():
        if isinstance(part, Linear4bit) and part.in_features % NF4_BLOCK:
            raise ValueError(
                f"{folder}: weights in four bits come in blocks of {NF4_BLOCK}, and {name} has {part.in_features} "
                "inputs: use device.method: lora"
            )


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a checkpoint's tokenizer exactly as its `tokenizer.json` says.

    `AutoTokenizer` rebuilds the tokenizers of some model types (qwen2) with a normaliser and word pattern of its own,
    and would so cut text differently from how the model was trained.

    Raises:
        ValueError: the folder has none, or one without an end token.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json")
    try:
        with quiet():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except BaseException as error:  # the tokenizers library raises bare exceptions over broken files, or panics,
        if isinstance(error, KeyboardInterrupt | SystemExit):  # which is no Exception
            raise
        raise ValueError(
            f"{folder} has no usable tokenizer (tokenizer.json, tokenizer_config.json): {' '.join(str(error).split())}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no end token (eos_token in tokenizer_config.json)")
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint; equal models give equal bytes."""
    with quiet():
        model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer's files into a folder that is there."""
    # What the last call padded or cut to would otherwise be saved.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    for key in ("is_local", "local_files_only"):  # how it was opened, not what it is
        tokenizer.init_kwargs.pop(key, None)
    with quiet():
        tokenizer.save_pretrained(folder)


def copy_description(source: Path, target: Path) -> None:
    """Copy what a checkpoint folder holds beside weights: config, generation config, tokenizer."""
    for path in sorted(source.iterdir()):
        weights = path.suffix not in {".json", ".jinja", ".txt", ".model"} or path.name == INDEX
        if path.is_file() and not weights and not path.name.startswith(".") and path.name not in (RECORD, MANIFEST):
            (target / path.name).write_bytes(path.read_bytes())


def write_descendant(ancestor: Path, parts: Iterable[Part], *, into: Path, resume: bool = False) -> None:
    """Write a checkpoint, with config and tokenizer of the one whose descendant it is, but its own dtype: the widest.

    With `resume`, what an interrupted call with the same arguments has finished is kept.
    """
    parts = list(parts)
    into.mkdir(parents=True, exist_ok=True)
    write(into, parts, resume=resume)
    copy_description(ancestor, into)
    config = open_config(ancestor)
    config.dtype = max((part.dtype for part in parts if part.dtype.is_floating_point), key=lambda dtype: dtype.itemsize)
    config.save_pretrained(into)


def trained_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors that are saved of a model that was opened from a checkpoint, sorted by name."""
    on_disk, needed, _ = _expected(skeleton(open_config(folder)))
    return {name: on_disk[name] for name in sorted(needed)}


def named_as(names: Iterable[str], folder: Path) -> dict[str, Stored]:
    """A checkpoint's tensors by the names that a model trained from it has, as far as it holds them.

    Training saves what the model needs. A folder from elsewhere may leave out the prefix of a model without its head,
    and hold more: a head that is tied, rotary tables of old.
    """
    held = stored(folder)
    prefix = f"{skeleton(open_config(folder)).base_model_prefix}."
    found = {name: held.get(name) or held.get(name.removeprefix(prefix)) for name in names}
    return {name: one for name, one in found.items() if one is not None}


def parameters(model: PreTrainedModel | Path) -> int:
    """Number of weights of a model, or stored in a folder; tied ones count once."""
    if isinstance(model, Path):
        return sum(math.prod(shape) for _, shape in shapes(model).values())
    return sum(parameter.numel() for parameter in model.parameters())


def validate(folder: Path) -> None:
    """Make sure that a folder from elsewhere is a checkpoint that opens, averages and assembles; little in memory.

    Raises:
        ValueError: names the folder or tensor at fault: no config or safetensors, an unsupported model type, tensors
            missing, unknown or of other shapes than the config's, or values that are not finite.
    """
    config, held = open_config(folder), shapes(folder)
    layers = config.num_hidden_layers
    if not 0 < layers <= len(held):  # or building the skeleton could take for ever
        raise ValueError(f"{folder}: config.json claims {layers} layers, but there are {len(held)} tensors")
    try:
        model = skeleton(config)
    except Exception as error:  # the fields come from elsewhere, and any of them can be impossible
        raise ValueError(f"{folder}/config.json describes no model: {' '.join(str(error).split())}") from error
    expected, needed, ignored = _expected(model)
    seen: set[str] = set()
    for name, (dtype, shape) in held.items():
        # Checkpoints of a model without its head leave out the prefix.
        full = name if name in expected else f"{model.base_model_prefix}.{name}"
        if full in expected:
            seen.add(full)
            if shape != expected[full]:
                raise ValueError(f"{folder}: tensor {name} has shape {shape} instead of {expected[full]}")
            if dtype not in TRAINABLE:
                raise ValueError(f"{folder}: tensor {name} is {dtype}: save it as float32, float16 or bfloat16")
        elif not any(re.search(pattern, name) for pattern in ignored):
            raise ValueError(f"{folder}: a {config.model_type} model has no tensor {name}")
    if missing := sorted(needed - seen):
        raise ValueError(f"{folder}: tensor {missing[0]} is missing")
    check_finite(folder)


def check_finite(folder: Path) -> None:
    """Read a checkpoint through, a block of a tensor in memory.

    Raises:
        ValueError: names the tensor whose values are not all finite.
    """
    for name, one in stored(folder).items():
        if one.dtype.is_floating_point and not all(bool(block.isfinite().all()) for block in one.through()):
            raise ValueError(f"{folder}: tensor {name} holds NaN or infinity")


def norm(folder: Path) -> float:
    """L2 norm of the weights that training changes."""
    blocks = (b for one in named_as(list(trained_shapes(folder)), folder).values() for b in one.through())
    return math.sqrt(sum(float(torch.linalg.vector_norm(block.double())) ** 2 for block in blocks))


def _expected(model: PreTrainedModel) -> tuple[dict[str, tuple[int, ...]], set[str], list[str]]:
    """A skeleton's tensors on disk: shape by name, the names that must be there, and patterns of names to pass over."""
    state = model.state_dict()
    on_disk = revert_weight_conversion(model, state)
    tied: set[str] = set(getattr(model, "all_tied_weights_keys", {}))
    needed = revert_weight_conversion(model, {name: tensor for name, tensor in state.items() if name not in tied})
    ignored = [r"rotary_emb\.inv_freq$", r"attn\.masked_bias$"]
    for part in model.modules():
        ignored += getattr(part, "_keys_to_ignore_on_load_unexpected", None) or []
    return {name: tuple(tensor.shape) for name, tensor in on_disk.items()}, set(needed), ignored


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over all that decides how text is cut: vocabulary, merges, normaliser, special tokens."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.update(padding=None, truncation=None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def lineage(config: PreTrainedConfig, tokenizer: str, ancestor: str) -> str:
    """A readable name for architecture (whose config fixes all shapes) + tokenizer fingerprint + ancestor's digest.

    The ancestor's is `weights.digest`, of its tensors alone: cut into shards it has the lineage that it has whole.
    """
    fields = {key: value for key, value in config.to_dict().items() if key not in NOT_ARCHITECTURE}
    whole = json.dumps([fields, tokenizer, ancestor], sort_keys=True, default=str)
    short = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{config.model_type}-h{config.hidden_size}-l{config.num_hidden_layers}-{short}"


def as_checkpoint(
    folder: Path,
    *,
    lineage_of: str | None = None,
    losses: tuple[tuple[int, float], ...] = (),
    work: Work | None = None,
) -> Checkpoint:
    """Seal a checkpoint folder. `lineage_of` is its lineage; without one the folder is an ancestor itself.

    Raises:
        ValueError: no supported checkpoint, or no usable tokenizer.
    """
    config = open_config(folder)
    if lineage_of is None:
        lineage_of = lineage(config, tokenizer_fingerprint(open_tokenizer(folder)), digest(folder))
    return Checkpoint(
        folder=folder,
        model_type=config.model_type,
        lineage=lineage_of,
        parameters=parameters(folder),
        active_parameters=family(config.model_type).matrix_parameters(config),
        losses=losses,
        work=work or Work(),
    ).sealed()
