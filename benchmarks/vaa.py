"""What matching teachers' features is worth (`objective.kind: vaa`): one joint student an arm, paired over seeds.

    python benchmarks/vaa.py [--seeds 10 11 12 13 14] [--arms NAME …] [--out runs/vaa] [--report benchmarks/NAME.md]
    python benchmarks/vaa.py --real RUN --arms NAME … [--tokens 30000] [--seeds 0 1 2 3 4] [--out runs/vaa-real]

A seed is a world: text, devices, teachers and what they write are made once and shared by its arms, whose students
start from the same base and see the same documents in the same order. An arm is a recipe with a few keys set, run by
`deepfusion.run`; its numbers are on disk as soon as it is done, so that a study can be stopped and goes on where it
was. With `--real`, RUN is a finished run of the recipe `real_llms` (see `pair.py`): its base learns from what its Gemma
devices wrote, who are asked for their features first. `--set key=value` changes the invented world. The report is
Markdown, on stdout too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any
from unittest.mock import patch

from scipy.stats import t as student_t
from torch import Tensor

import pair
from deepfusion import Recipe, Runtime, run, students
from deepfusion.config import LogitsObjective, VAAObjective
from deepfusion.findings import versions
from deepfusion.objectives import Objective
from deepfusion.objectives import build_objective as build
from seeds import commit, machine

CONTROL, LONGER = "logits", "logits, 1.2 ×"
PUBLISHED: dict[str, Any] = {
    "kind": "vaa", "alpha": 1.0, "stages": 2, "patches": 8, "width": 64, "heads": 4, "teacher_layers": "stage_ends",
    "standardise": "dimension", "matching": "mse", "attention": True, "causal": False, "residual": False, "warmup": 0,
}  # fmt: skip
PLAIN: dict[str, Any] = {"attention": False}
RELATIONAL: dict[str, Any] = {"matching": "relational", **PLAIN}
# Arm → what it changes in the objective as published; none: no features are matched.
ARMS: dict[str, dict[str, Any] | None] = {
    CONTROL: None,
    "vaa": {},
    "no attention": PLAIN,
    "placebo": {"alpha": 1e-6},
    LONGER: None,
    "α 0.1": {"alpha": 0.1},
    "α 10": {"alpha": 10.0},
    "α 100": {"alpha": 100.0},
    "J 1": {"stages": 1},
    "J 3": {"stages": 3},
    "patches 2": {"patches": 2},
    "patches 20": {"patches": 20},
    "residual": {"residual": True},
    "causal": {"causal": True},
    "warmup": {"warmup": 130},
    "layer norm": {"standardise": "layer_norm"},
    "not standardised": {"standardise": "none"},
    "last layer": {"teacher_layers": "last"},
    "cosine": {"matching": "cosine"},
    "relational": RELATIONAL,
    "relational, α 10": {"alpha": 10.0, **RELATIONAL},
    "β 0": None,
    "β 0, vaa": {},
}
BESIDE: dict[str, dict[str, Any]] = {"β 0": {"beta": 0.0}, "β 0, vaa": {"beta": 0.0}}  # what else an arm changes
CONTROLS = {"β 0, vaa": "β 0"}  # of arms that have one of their own
METRICS = {
    "nats, private": ("private_only", "token_log_perplexity"),
    "nats, all": ("all", "token_log_perplexity"),
    "accuracy, private": ("private_only", "token_accuracy"),
    "accuracy, all": ("all", "token_accuracy"),
}
JOINT_ALONE = ("distill.shares={joint: 1, branch: 0, tune: 0}", "evaluate.references=[]")
INVENTED = (
    "name=vaa", "data.source.private_facts=24", "data.source.public_facts=8", "data.partition.devices=8",
    "data.partition.holders=1", "models.base.make.tokens=200000", "models.ancestors.gpt2.make.layers=3",
    "models.ancestors.llama.make.layers=3", "models.ancestors.gpt_neox.make.layers=3",
    "transfer.sampled_per_cluster=600", "distill.budget_tokens=320000", *JOINT_ALONE,
)  # fmt: skip
Outcome = dict[str, Any]


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--real", type=Path, metavar="RUN")
    parser.add_argument("--tokens", type=int, default=pair.TOKENS, help="of training, with --real")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, default=Path("runs/vaa"))
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.real:
        METRICS.clear()
        METRICS.update({metric: (domain, "") for metric, domain in pair.METRICS.items()})
    world = invented(arguments.overrides)
    found: dict[str, dict[int, Outcome]] = {name: {} for name in arguments.arms}
    for seed in arguments.seeds:
        for name in arguments.arms:
            out = arguments.out / str(seed)
            how = partial(really, arguments.real, name, seed, arguments.tokens) if arguments.real else measured
            found[name][seed] = outcome(arm(world, name, seed), name, out, how)
    text = "\n".join(report(found, sys.argv[1:], 4 if arguments.real else 3))
    print(text)
    if arguments.report:
        arguments.report.write_text(text + "\n", encoding="utf-8")


# ── arms ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def invented(overrides: Sequence[str]) -> Recipe:
    """A smaller world than the demo's: eight devices, three architectures, two tokenizers, four domains."""
    return Recipe.load("demo", [*INVENTED, *overrides])


def arm(world: Recipe, name: str, seed: int) -> Recipe:
    """The recipe of one arm."""
    tree, changes = world.model_dump(mode="json"), ARMS[name]
    distill = tree["distill"]
    plain = {key: value for key, value in distill["objective"].items() if key in LogitsObjective.model_fields}
    features = {} if changes is None else {**PUBLISHED, **changes}
    distill["objective"] = {**plain, **features, **BESIDE.get(name, {})}
    if name == LONGER:
        distill["budget_tokens"] = round(1.2 * distill["budget_tokens"])
    tree["seed"] = seed
    return Recipe.model_validate(tree)


def outcome(recipe: Recipe, name: str, out: Path, how: Callable[[Recipe, Path], Outcome] | None = None) -> Outcome:
    """An arm's numbers: from disk, or measured."""
    file = out / "arms" / f"{name}.json"
    if not file.exists():
        found = (how or measured)(recipe, out)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found), encoding="utf-8")
        print(recipe.seed, name, *(round(found[metric], 4) for metric in METRICS), file=sys.stderr, flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


class Trainings:
    """Notes the loss terms of every step of a training, and the processor time at which they were there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.terms: list[dict[str, float]] = []

    def build(self, *arguments: Any) -> Objective:
        """In place of `build_objective`; with a new objective a new training begins."""
        self.seconds, self.terms = [], []
        objective = build(*arguments)
        objective.register_forward_hook(self.note)
        return objective

    def note(self, objective: Objective, inputs: Any, terms: Mapping[str, Tensor]) -> None:
        """One step."""
        self.seconds.append(time.process_time())
        self.terms.append({name: float(term.detach()) for name, term in terms.items()})

    def summary(self) -> Outcome:
        """Steps, processor seconds that one takes, and the curves of two terms."""
        return {
            "steps": len(self.terms),
            "step": median(later - earlier for earlier, later in pairwise(self.seconds)),
            "fm": [round(terms["fm"], 4) for terms in self.terms] if "fm" in self.terms[-1] else None,
            "ce": [round(terms["ce"], 4) for terms in self.terms],
        }


def measured(recipe: Recipe, out: Path) -> Outcome:
    """Train one arm's student, the last training of its run, and measure it."""
    shutil.rmtree(out / "steps" / "joint", ignore_errors=True)  # one found in the store could not be watched
    trainings = Trainings()
    with patch.object(students, "build_objective", trainings.build):
        run(recipe, out, Runtime(workers=0))
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = {
        (row["subset"], row["metric"]): row["value"]
        for row in results["rows"]
        if row["system"] == "joint_student" and row["domain"] == "all"
    }
    parts = {part["part"]: part["token_parameters"] for part in results["compute"] if part["system"] == "deepfusion"}
    return {
        **{name: rows[key] for name, key in METRICS.items()},
        **trainings.summary(),
        "consult": sum(phase["cpu_seconds"] for phase in results["phases"] if phase["name"] == "consult"),
        "compute": {part: parts[part] for part in ("joint", "consult") if part in parts},
    }


def really(run: Path, name: str, seed: int, tokens: int, recipe: Recipe, out: Path) -> Outcome:
    """An arm on a real pair: what it sets in the objective, and as many tokens as it gets, are as in the recipe."""
    objective, tokens = recipe.distill.objective, round(tokens * (1.2 if name == LONGER else 1))
    real_pair, trainings = pair.Pair.of(run, out), Trainings()
    changed = {field: getattr(objective, field) for field in objective.model_fields_set if field != "across"}
    config = pair.configured(changed)
    began = time.process_time()
    asked = objective.features.model_dump_json() if isinstance(objective, VAAObjective) else None
    teachings = [] if asked is None else real_pair.teachings(config, out.parent / "consult" / filed(asked))
    consult = time.process_time() - began
    with patch.object(students, "build_objective", trainings.build):
        student = real_pair.trained(config, tokens, seed, out / "student", teachings)
    work = {"consult": sum(teaching.work.token_parameters for teaching in teachings)}
    return {**real_pair.scores(student, out), **trainings.summary(), "consult": consult, "compute": work}


def filed(name: str) -> str:
    """A name for a folder."""
    return hashlib.sha256(name.encode()).hexdigest()[:8]


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(found: Mapping[str, Mapping[int, Outcome]], given: Sequence[str], digits: int) -> Iterator[str]:
    """The Markdown page, line by line."""
    seeds = list(next(iter(found.values())))
    yield "# Matching teachers' features, arm by arm"
    yield ""
    yield f"    python benchmarks/vaa.py {shlex.join(given)}".rstrip()
    yield ""
    yield (
        f"{machine()} Versions: {', '.join(f'{k} {v}' for k, v in versions().items())}. Commit {commit()}. "
        f"Seeds {', '.join(map(str, seeds))}."
    )
    yield (
        "Differences are paired by seed: mean ± half of the 95 % interval (Student's t); in brackets in how many seeds "
        "the arm is better. `placebo` is `vaa` with α = 1e-6: how far trainings differ once a last digit does."
    )
    yield ""
    yield from against(found, CONTROL, digits)
    if LONGER in found:
        yield "## Against `logits` with as much time as `vaa` takes"
        yield ""
        yield from against(found, LONGER, digits)
    yield "## Feature loss and time"
    yield ""
    yield (
        "Feature loss: mean over seeds of the first 2 % of steps, of 2 % at half time and at three quarters, and of "
        "the last 2 %. Time is processor time, of training and of asking teachers, relative to `logits`: median over "
        "seeds."
    )
    yield ""
    yield "| arm | first | half | three quarters | last | ms a step | time | of it, teachers |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, of in found.items():
        curve = [mean(at(one["fm"], share) for one in of.values()) for share in (0, 0.5, 0.75, 1) if is_matched(of)]
        cells = [f"{value:.3f}" for value in curve] or [""] * 4
        times = [(seconds(one) + one["consult"]) / seconds(found[CONTROL][seed]) for seed, one in of.items()]
        asking = [one["consult"] / seconds(found[CONTROL][seed]) for seed, one in of.items()]
        cells += [f"{1000 * median(one['step'] for one in of.values()):.1f}", f"{median(times):.2f}"]
        cells += [f"{median(asking):.2f}" if any(asking) else ""]
        yield f"| {name} | {' | '.join(cells)} |"


def against(found: Mapping[str, Mapping[int, Outcome]], control: str, digits: int) -> Iterator[str]:
    """A table of paired differences from one control; arms that have a control of their own are counted from that."""
    level = next(iter(METRICS))
    yield f"| arm | {level} | " + " | ".join(f"Δ {metric}" for metric in METRICS) + " |"
    yield "|---|---:|" + "---:|" * len(METRICS)
    for name, of in found.items():
        other = found[CONTROLS.get(name, control)]
        cells = [f"{mean(one[level] for one in of.values()):.{digits}f}"]
        cells += [difference(of, other, metric, digits) if of is not other else "" for metric in METRICS]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def difference(of: Mapping[int, Outcome], other: Mapping[int, Outcome], metric: str, digits: int) -> str:
    """Mean ± half of the 95 % interval of the paired differences, and how often they are for the better."""
    values = [of[seed][metric] - other[seed][metric] for seed in of]
    better = sum(value > 0 if metric.startswith("accuracy") else value < 0 for value in values)
    if len(values) == 1:
        return f"{values[0]:+.{digits}f}"
    half = student_t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.{digits}f} ± {half:.{digits}f} ({better}/{len(values)})"


def seconds(one: Outcome) -> float:
    """Processor time of a training's steps."""
    return one["step"] * one["steps"]


def is_matched(of: Mapping[int, Outcome]) -> bool:
    """Whether an arm has a feature loss."""
    return all(one["fm"] for one in of.values())


def at(curve: Sequence[float], share: float) -> float:
    """Mean of 2 % of a curve: its first for 0, its last for 1."""
    size = max(1, len(curve) // 50)
    first = round(share * (len(curve) - size))
    return mean(curve[first : first + size])


if __name__ == "__main__":
    main()
