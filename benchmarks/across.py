"""How a teacher of another tokenizer is heard best (`distill.objective.across`): one student an arm, paired over seeds.

    python benchmarks/across.py [--seeds 20 21 22 23 24] [--arms NAME …] [--out runs/across] [--report FILE]
    python benchmarks/across.py --real RUN [--tokens 30000] [--seeds 0 …] [--arms NAME …] [--report FILE]

Invented text: a seed is a world of eight devices, none of whose tokenizers is the base's; what they write is made once
and shared by its arms. The arm `same tokenizer` has a base with the devices' own: exact KL, what crossing costs.
With `--real`, RUN is a finished run of the recipe `real_llms`: its base learns from what its Gemma devices wrote, their
own probabilities (not shifted) its teacher, and answers the run's test questions of private groups; the seed is that of
the order of the text. `--set key=value` changes the world.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pair
import vaa
from deepfusion import Recipe
from deepfusion.findings import versions
from seeds import commit, machine

CONTROL, SAME = "no teacher", "same tokenizer"
# Arm → what it sets in the objective.
ARMS: dict[str, dict[str, Any]] = {
    CONTROL: {"beta": 0.0},
    "span_likelihood": {"across": "span_likelihood"},
    "span_likelihood, τ 1": {"across": "span_likelihood", "span_temperature": 1.0},
    "projected_kl": {"across": "projected_kl"},
    "hybrid_kl": {"across": "hybrid_kl"},
    "mined": {"across": "mined"},
    "uld": {"across": "uld"},
    SAME: {},
}
METRICS = {
    "nats a byte, private": ("private_only", "answer_nats_per_byte"),
    "nats a byte, all": ("all", "answer_nats_per_byte"),
    "accuracy, private": ("private_only", "choice_accuracy"),
    "accuracy, all": ("all", "choice_accuracy"),
}
WORLD = ("models.base.make.vocab=384", "models.ancestors.gpt_neox.make.vocab=512", "distill.budget_tokens=240000")


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME")
    parser.add_argument("--real", type=Path, metavar="RUN")
    parser.add_argument("--tokens", type=int, default=pair.TOKENS, help="of training, with --real")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, default=Path("runs/across"))
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    vaa.METRICS.clear()
    vaa.METRICS.update({name: (domain, "") for name, domain in pair.METRICS.items()} if arguments.real else METRICS)
    names = [name for name in arguments.arms if not (arguments.real and name == SAME)]
    found: dict[str, dict[int, vaa.Outcome]] = {name: {} for name in names}
    for seed in arguments.seeds:
        for name in names:
            out = arguments.out / str(seed)
            if arguments.real:
                found[name][seed] = real(arguments.real, name, seed, arguments.tokens, out)
            else:
                found[name][seed] = vaa.outcome(arm(name, seed, arguments.overrides), name, out)
    text = "\n".join(report(found, sys.argv[1:], 4 if arguments.real else 3))
    print(text)
    if arguments.report:
        arguments.report.write_text(text + "\n", encoding="utf-8")


def arm(name: str, seed: int, overrides: list[str]) -> Recipe:
    """The recipe of one arm."""
    world = Recipe.load("demo", [*vaa.INVENTED, "name=across", *WORLD, *overrides])
    tree = world.model_dump(mode="json")
    tree["distill"]["objective"] |= ARMS[name]
    if name == SAME:
        tree["models"]["base"]["make"]["vocab"] = 512
    tree["seed"] = seed
    return Recipe.model_validate(tree)


# ── real models ───────────────────────────────────────────────────────────────────────────────────────────────────────


def real(run: Path, name: str, seed: int, tokens: int, out: Path) -> vaa.Outcome:
    """An arm's numbers on real models: from disk, or measured."""
    file = out / "arms" / f"{name}.json"
    if not file.exists():
        found = measured(run, name, seed, tokens, out)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found), encoding="utf-8")
        print(seed, name, *(round(found[metric], 4) for metric in pair.METRICS), file=sys.stderr, flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


def measured(run: Path, name: str, seed: int, tokens: int, out: Path) -> vaa.Outcome:
    """Train the run's base on what writers of other tokenizers wrote, and let it answer."""
    real_pair = pair.Pair.of(run, out)
    began = time.process_time()
    student = real_pair.trained(pair.configured(ARMS[name]), tokens, seed, out / "student")
    return {"seconds": time.process_time() - began, **real_pair.scores(student, out)}


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(found: dict[str, dict[int, vaa.Outcome]], given: list[str], digits: int) -> list[str]:
    """The Markdown page, line by line."""
    seeds = list(next(iter(found.values())))
    return [
        "# Teachers with other tokenizers, arm by arm",
        "",
        f"    python benchmarks/across.py {shlex.join(given)}".rstrip(),
        "",
        f"{machine()} Versions: {', '.join(f'{k} {v}' for k, v in versions().items())}. Commit {commit()}. "
        f"Seeds {', '.join(map(str, seeds))}.",
        "Differences are paired by seed: mean ± half of the 95 % interval (Student's t); in brackets in how many seeds "
        "the arm is better. Nats are of answers, a byte.",
        "",
        *vaa.against(found, CONTROL, digits),
    ]


if __name__ == "__main__":
    main()
