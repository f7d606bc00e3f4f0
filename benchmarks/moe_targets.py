"""How far an MoE of equal students is from the student, for every target of assembly and every layout.

    python benchmarks/moe_targets.py [--report benchmarks/NAME.md]

Tiny models, less than a minute of one core. The report is Markdown, on stdout too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deepfusion.artifacts import Checkpoint, TransferSet
from deepfusion.checkpoints import as_checkpoint, make_model, make_tokenizer, open_model, open_tokenizer, save_model
from deepfusion.config import AssemblePhase, MadeModel, Runtime
from deepfusion.config.targets import KIN
from deepfusion.data.documents import TransferDocument, write_jsonl
from deepfusion.families import TARGETS, experts
from deepfusion.layouts import plan, probability
from deepfusion.phases.assemble import merge
from deepfusion.routing import recorded
from seeds import commit, machine

SUBJECTS = (
    "the fox hunts in the old forest at night and sleeps by day under roots",
    "the mason cuts amber and jade into rings that merchants sell in the port",
    "the doctor gives veltrine against marsh fever and cold tea against a cough",
    "the clerk writes that a contract signed under threat is void in this court",
    "the smith heats iron until it glows and folds it nine times over the anvil",
    "the sailor reads the stars and a compass to find the way across the strait",
    "the baker weighs rye and water and lets the dough rest until early morning",
    "the gardener prunes the pear in winter and ties the vine to a southern wall",
)
LOUDER = 6.0  # than fresh weights of standard deviation .02: layers then add about as much as they are given
SHAPE: dict[str, Any] = {"hidden": 64, "ffn": 128, "layers": 4, "heads": 4, "vocab": 400, "context": 128}
FINE: dict[str, Any] = {"layout": "fine_grained", "granularity": 4, "expert_width": 40}
EIGHT: dict[str, Any] = {"layout": "fine_grained", "granularity": 8, "expert_width": 20}


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        text = "\n".join(report(Path(scratch)))
    print(text)
    if arguments.report:
        arguments.report.write_text(text + "\n", encoding="utf-8")


def cases() -> Iterator[tuple[str, str, int, AssemblePhase]]:
    """(target, base, students, settings) of every row."""
    for target, bases in KIN.items():
        for base in bases:
            top = 1 if target == "deepseek" else 2
            yield target, base, 4, AssemblePhase(target=target)
            yield target, base, 4, AssemblePhase(target=target, top_k=top, **FINE)
            if target == "mixtral":
                continue
            for scale in (0.1, 1.0):
                loose: dict[str, Any] = {"target": target, "renormalise": False, "router_scale": scale, "top_k": 1}
                yield target, base, 4, AssemblePhase(**loose)
                yield target, base, 4, AssemblePhase(**loose, **FINE)
    for target, base, students, shape in (("qwen2_moe", "qwen2", 8, FINE), ("deepseek", "llama", 8, EIGHT)):
        for scale in (0.01, 0.1, 0.3, 1.0):
            loose = {"target": target, "renormalise": False, "router_scale": scale, "top_k": 1}
            yield target, base, students, AssemblePhase(**loose, **shape)


def report(scratch: Path) -> Iterator[str]:
    """The Markdown page, line by line."""
    yield "# An MoE of equal students against the student"
    yield ""
    yield "    python benchmarks/moe_targets.py"
    yield ""
    yield f"{machine()} Torch {torch.__version__}, one thread, float32. Commit {commit()}."
    yield (
        "Students of hidden size 64, FFN 128 and 4 layers with random weights; router rows from hidden means over as "
        "many subjects as there are students. `logits`: root mean square and largest difference of a logit, over the "
        "standard deviation of the student's logits. `P`: relative spread over tokens of the weight that a "
        "chosen shard gets, where weights are not renormalised: what a block's output is wrong by (see `layouts.py`)."
    )
    yield ""
    yield "| target | base | layout | experts, used | renormalised | router scale | logits, rms | largest | P |"
    yield "|---|---|---|---|---|--:|--:|--:|--:|"
    made: dict[str, Checkpoint] = {}
    for number, (target, base, students, config) in enumerate(cases()):
        if base not in made:
            made[base] = student(base, scratch / base)
        into = scratch / str(number)
        into.mkdir()
        moe = merge(
            [made[base]] * students, spoken(scratch, students), config, seed=0, into=into, runtime=Runtime(workers=0)
        )
        network = open_model(moe.folder)
        held, ids = experts(network.config), tokens(moe, students)
        with torch.inference_mode(), recorded(network) as routed:
            dense, merged = open_model(made[base].folder)(ids).logits, network(ids).logits
        error = (merged - dense) / dense.std()
        spread = "" if config.renormalise else f"{of_probability(network, config, [one[0] for one in routed]):.3f}"
        renormalised = "yes" if config.renormalise else "no"
        layout = "coarse" if config.granularity is None else f"fine-grained, {config.granularity} shards"
        yield (
            f"| {target} | {base} | {layout} | {held.count}, {held.chosen} | {renormalised} | {config.router_scale:g} "
            f"| {float(error.square().mean().sqrt()):.1e} | {float(error.abs().max()):.1e} | {spread} |"
        )


def of_probability(network: PreTrainedModel, config: AssemblePhase, logits: list[Tensor]) -> float:
    """Relative standard deviation of P over tokens, mean over layers."""
    held, moe = experts(network.config), TARGETS[network.config.model_type]
    layout = plan(config, clusters=held.clusters, channels=SHAPE["ffn"], shared=moe.common)
    found = [probability(one[:, :: held.count // held.clusters], layout) for one in logits]
    return sum(float(one.std() / one.mean()) for one in found) / len(found)


def student(base: str, folder: Path) -> Checkpoint:
    """A fresh model whose every weight does something."""
    tokenizer = make_tokenizer(SUBJECTS, SHAPE["vocab"])
    model = make_model(MadeModel(type=base, **SHAPE), tokenizer, seed=0)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= LOUDER
    save_model(model, tokenizer, folder)
    return as_checkpoint(folder)


def spoken(scratch: Path, students: int) -> TransferSet:
    """A transfer set with a subject per student."""
    folder = scratch / f"transfer-{students}"
    folder.mkdir(exist_ok=True)
    documents = [
        TransferDocument(id=f"{n}-{m}", domain="x", answer=" ".join(SUBJECTS[n].split()[m:]), kind="sampled", cluster=n)
        for n in range(students)
        for m in range(6)
    ]
    write_jsonl(folder / "documents.jsonl", documents)
    return TransferSet(folder=folder, counts={}, per_cluster=(6,) * students, by_writer={}, private_text_risk=False)


def tokens(moe: Checkpoint, students: int) -> Tensor:
    """The subjects, one a row, cut to the shortest."""
    tokenizer = open_tokenizer(moe.folder)
    rows = [[0, *tokenizer(text).input_ids] for text in SUBJECTS[:students]]
    shortest = min(map(len, rows))
    return torch.tensor([row[:shortest] for row in rows])


if __name__ == "__main__":
    main()
