"""The models that a run starts from, looked at one by one: whether they open, and what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_bitsandbytes_available

from deepfusion import checkpoints
from deepfusion.adapters import sites
from deepfusion.config import LoRA, MadeModel, ModelSource, Recipe
from deepfusion.data.tokens import Tokenizer
from deepfusion.display import amount
from deepfusion.doctor.diagnosis import Check
from deepfusion.doctor.shapes import Shape
from deepfusion.families import context_length, experts, family, skeleton
from deepfusion.labels import joined
from deepfusion.phases.assemble import shape_of
from deepfusion.roles import NO_KIN, WITHOUT_KIN, starting_points
from deepfusion.weights import digest

BASE = "models.base"
# Above these, what was found for models made on the spot is wrong for one that was trained elsewhere.
PRETRAINED_PARAMETERS, PRETRAINED_RATE = 10_000_000, 5e-4
ADAPTER_RATE = 2e-3  # adapters bear more


@dataclass(frozen=True)
class Start:
    """A model that a run starts from, given or still to be made."""

    key: str  # in the recipe, as models.ancestors.gpt2
    config: PreTrainedConfig
    tokenizer: Tokenizer
    shape: Shape
    lineage: str
    folder: Path | None = None
    made: MadeModel | None = None

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return self.key.rpartition(".")[2]

    @property
    def context(self) -> int | None:
        """Tokens of the longest text that it takes, if there is a limit."""
        return context_length(self.config)


def sources(recipe: Recipe) -> dict[str, ModelSource]:
    """Key → where it comes from, of every model that the recipe names."""
    ancestors = {f"models.ancestors.{name}": source for name, source in recipe.models.ancestors.items()}
    return {BASE: recipe.models.base, **ancestors}


def given(key: str, folder: Path) -> Start:
    """A checkpoint folder as a run would take it: opened, and read through once.

    Raises:
        ValueError: it cannot be used; names what is wrong with it.
    """
    checkpoints.validate(folder)
    tokenizer = Tokenizer(checkpoints.open_tokenizer(folder))
    config = checkpoints.open_config(folder)
    return Start(
        key,
        config,
        tokenizer,
        Shape.of(config),
        lineage=checkpoints.lineage(config, tokenizer.fingerprint, digest(folder)),
        folder=folder,
    )


def made(key: str, model: MadeModel, texts: Sequence[str], known: dict[int, Tokenizer]) -> Start:
    """A model that the run will make: its tokenizer made now, its weights left out.

    Args:
        key: in the recipe.
        model: what to make.
        texts: the public text.
        known: vocabulary size → tokenizer; those of equal size are shared, and put in here.
    """
    if model.vocab not in known:
        known[model.vocab] = Tokenizer(checkpoints.make_tokenizer(texts, model.vocab))
    tokenizer = known[model.vocab]
    config = family(model.type).config(model, len(tokenizer.raw), end=tokenizer.end)
    return Start(
        key,
        config,
        tokenizer,
        Shape.of(config),
        lineage=f"{key}, made",  # from a seed of its own
        made=model,
    )


def described(start: Start) -> str:
    """What a model is, in a line."""
    config, parts = start.config, [start.config.model_type, f"{amount(start.shape.parameters)} parameters"]
    if start.folder is not None:
        held = checkpoints.shapes(start.folder)
        files = set(checkpoints.index(start.folder).values())
        dtypes = sorted({str(dtype).removeprefix("torch.") for dtype, _ in held.values()})
        parts += ["/".join(dtypes), "one file" if len(files) == 1 else f"{len(files)} files"]
    else:
        parts.append("to be made")
    parts.append("head tied to the embedding" if config.tie_word_embeddings else "head of its own")
    parts.append(f"context {start.context or 'unlimited'}")
    known, room = len(start.tokenizer.table), int(config.vocab_size)
    parts.append(f"vocabulary {known}" + (f" padded to {room}" if room > known else ""))
    return ", ".join(parts)


def about(start: Start) -> Iterator[Check]:
    """What is to be said of a model that opens."""
    yield Check("models", start.key, "ok", described(start))
    table, room = start.tokenizer.table, int(start.config.vocab_size)
    if len(table) > room:
        yield Check(
            "models", start.key, "warning",
            f"its tokenizer has {len(table) - room} tokens more than the model's vocabulary of {room}",
            "see that no text uses them: a model has no embedding for them",
        )  # fmt: skip


def trainings(starts: Mapping[str, Start], recipe: Recipe) -> Iterator[Check]:
    """Whether what is set for training suits the models that are trained."""
    base = [start for start in starts.values() if start.key == BASE]
    ancestors = [start for start in starts.values() if start.key != BASE]
    sections = {"device": (recipe.device, ancestors), "distill": (recipe.distill, base), "tune": (recipe.tune, base)}
    for section, (phase, trained) in sections.items():
        training = phase.training
        known = [start.key for start in trained if start.folder and start.shape.parameters >= PRETRAINED_PARAMETERS]
        adapts = section == "device" and recipe.device.adapts
        most, better = (ADAPTER_RATE, 5e-4) if adapts else (PRETRAINED_RATE, 2e-5 if section == "tune" else 5e-5)
        # With a share of it, the whole is for the controls: they start from the base, and have less to lose.
        share = recipe.distill.joint_rate if section == "distill" else 1.0
        if known and training.learning_rate * share > most:
            yield Check(
                "training", f"{section}.training", "warning",
                f"learning_rate {training.learning_rate:g} was found for tiny models, and is much for {joined(known)}",
                f"lower it, as with --set {section}.training.learning_rate={better:g}",
            )  # fmt: skip
        for start in trained:
            if start.context and training.context > start.context:
                yield Check(
                    "training", f"{section}.training", "warning",
                    f"context is {training.context}, and {start.key} takes {start.context} tokens",
                    "no text is longer than that: lower the context",
                )  # fmt: skip


def as_base(base: Start, recipe: Recipe) -> Check:
    """Whether experts can be cut from the base, and what it becomes."""
    try:
        target = shape_of(base.config, recipe.cluster.k, recipe.assemble).config
    except ValueError as error:
        return Check("models", base.key, "problem", str(error), "choose another model as models.base")
    shape, moe = Shape.of(target), experts(target)
    fact = f"becomes a {target.model_type} of {moe.count} experts, {moe.chosen} a token: "
    sizes = f"{amount(shape.parameters)} parameters, {amount(shape.active)} active a token"
    return Check("models", base.key, "ok", fact + sizes)


def adapted(start: Start, method: str, lora: LoRA) -> Check:
    """Whether devices that start from a model can train adapters as the recipe says, and how large these are."""
    found = sites(skeleton(start.config), lora).values()
    if method == "qlora":
        if not is_bitsandbytes_available():
            return Check("models", start.key, "problem", "weights in four bits need bitsandbytes",
                         "pip install 'deepfusion-moe[nf4]', or set device.method: lora")  # fmt: skip
        block = checkpoints.NF4_BLOCK
        if odd := next((site for site in found if site.inputs % block), None):
            fact = f"weights in four bits come in blocks of {block}, and {odd.inner} has {odd.inputs} inputs"
            return Check("models", start.key, "problem", fact, "set device.method: lora")
    share = f"{amount(adapter(start, lora))} of {amount(start.shape.parameters)} weights are trained"
    return Check("models", start.key, "ok", f"{share}, in adapters of rank {lora.rank}")


def adapter(start: Start, lora: LoRA) -> int:
    """Weights of an adapter of this model."""
    found = sites(skeleton(start.config), lora).values()
    return sum(lora.rank * (site.inputs + site.outputs) for site in found)


def lineages(
    ancestors: Mapping[str, Start], devices: Sequence[str], recipe: Recipe, *, elsewhere: bool = False
) -> Iterator[Check]:
    """Whose devices can be averaged with whose."""
    start_of = starting_points(devices, recipe.models, recipe.seed)
    more = "name more devices in federation.devices" if elsewhere else "raise data.partition.devices"
    groups: dict[str, list[str]] = {}
    for name, start in ancestors.items():
        groups.setdefault(start.lineage, []).append(name)
    for names in groups.values():
        held = [device for device, name in start_of.items() if name in names]
        called = " and ".join(names)
        same = f"{called} are the same model by content; " if len(names) > 1 else ""
        few = "no device starts from it" if not held else f"{len(held)} devices start from it"
        if len(held) == 1:
            few = "one device starts from it"
        can = ", and can be averaged in a cluster" if len(held) > 1 else ""
        yield Check("lineages", called, "ok" if held else "warning", f"{same}{few}{can}",
                    "" if held else f"{more}, or leave the ancestor out")  # fmt: skip
    alike: dict[str, list[str]] = {}
    for name, start in ancestors.items():
        if start.made:
            alike.setdefault(start.made.model_dump_json(), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            yield Check(
                "lineages", " and ".join(names), "warning",
                "are made alike, but each from a seed of its own: their devices are never averaged",
                "name one ancestor instead of these: any number of devices can start from it",
            )  # fmt: skip
    used = {ancestors[name].lineage for name in start_of.values()}
    if recipe.cluster.mode == "by_type" and recipe.cluster.k < len(used):
        yield Check(
            "lineages", "cluster.k", "problem",
            f"{recipe.cluster.k} type-pure clusters cannot hold {len(used)} lineages",
            f"raise cluster.k to {len(used)} or more, or set cluster.mode: by_domain",
        )  # fmt: skip


def of_the_base(base: Start, ancestors: Mapping[str, Start], devices: Sequence[str], recipe: Recipe) -> Iterator[Check]:
    """Whether what devices learn in the base's own weights is used."""
    start_of = starting_points(devices, recipe.models, recipe.seed)
    kin = sum(ancestors[name].lineage == base.lineage for name in start_of.values())
    if kin and not recipe.distill.task_vectors:
        yield Check(
            "lineages", "distill.task_vectors", "warning",
            f"{'one device starts' if kin == 1 else f'{kin} devices start'} from the base itself, "
            "and what is learned there in its weights is not used",
            "set distill.task_vectors: 0.75, distill.own_task_vectors: true, and distill.joint_rate and "
            "distill.branch_rate: 0.1",
        )  # fmt: skip
    elif kin:
        yield Check("lineages", "distill.task_vectors", "ok",
                    f"{'one device starts' if kin == 1 else f'{kin} devices start'} from the base itself, "
                    "and what is learned there in its weights is added to it")  # fmt: skip
    elif recipe.distill.task_vectors:
        yield Check("lineages", "distill.task_vectors", "warning", NO_KIN, WITHOUT_KIN)
