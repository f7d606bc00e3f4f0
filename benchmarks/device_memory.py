"""What training on a device takes: full, LoRA and NF4 + LoRA, each in a fresh process, on a checkpoint folder.

    python benchmarks/device_memory.py models/smollm2-135m [--methods full lora qlora] [--dtypes float32 bfloat16]
        [--steps 20] [--context 512] [--gradient-checkpointing] [--merging]

Prints peak resident memory, what of it was there before the model was opened, tokens per second of one core, and the
loss. The text is that of the embedded benchmark, 80 documents held out. With `--merging`, also what becomes of an
adapter when it is added to the ancestor's weights: in float32, rounded to bfloat16, and to those that NF4 training saw.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

HELD_OUT = 80
RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--merging", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # the fresh process
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measured(arguments)))
        return
    print("| method | weights | peak memory | before | trained weights | tokens/s | loss, first → last |")
    print("|---|---|---:|---:|---:|---:|---:|")
    merged: list[tuple[str, dict[str, float]]] = []
    for dtype in arguments.dtypes:
        for method in arguments.methods:
            facts = fresh(arguments, method, dtype)
            peak, before = (f"{facts[key] / 2**20:,.0f} MiB" for key in ("peak_bytes", "before_bytes"))
            loss = f"{facts['first']:.3f} → {facts['last']:.3f}"
            cells = [method, dtype, peak, before, f"{facts['trained']:,}", f"{facts['speed']:.0f}", loss]
            print(f"| {' | '.join(cells)} |", flush=True)
            if facts["merged"]:
                merged.append((f"{method}, {dtype}", facts["merged"]))
    if merged:
        print("\n| nats per token of held-out documents | " + " | ".join(name for name, _ in merged) + " |")
        print("|---|" + "---:|" * len(merged))
        for key in {key: None for _, found in merged for key in found}:
            print(f"| {key} | " + " | ".join(f"{found[key]:.4f}" if key in found else "" for _, found in merged) + " |")


def fresh(arguments: argparse.Namespace, method: str, dtype: str) -> dict[str, Any]:
    """One training in a process of its own."""
    command = [sys.executable, __file__, str(arguments.folder), "--alone", "--methods", method, "--dtypes", dtype]
    command += ["--steps", str(arguments.steps), "--context", str(arguments.context)]
    command += ["--gradient-checkpointing"] * arguments.gradient_checkpointing + ["--merging"] * arguments.merging
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, and say what it took."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch

    from deepfusion import adapters, checkpoints, memory
    from deepfusion.config import LoRA, Runtime, SyntheticData, Training
    from deepfusion.data.batches import Schedule
    from deepfusion.data.documents import Document
    from deepfusion.data.lessons import lessons
    from deepfusion.data.synthetic import fact_documents, world
    from deepfusion.data.tokens import Tokenizer
    from deepfusion.families import family
    from deepfusion.objectives import build_objective
    from deepfusion.students import PLAIN
    from deepfusion.training import Learner, fit

    [method], [dtype], lora = arguments.methods, arguments.dtypes, LoRA()
    torch.set_num_threads(1)
    training = Training(
        learning_rate=RATES[method],
        context=arguments.context,
        rows=1,
        dtype=dtype,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )
    tokenizer = Tokenizer(checkpoints.open_tokenizer(arguments.folder))

    random = Random(0)
    text = [one for fact in world(SyntheticData(kind="synthetic"), 0).facts for one in fact_documents(fact, 10, random)]
    random.shuffle(text)

    def schedule(documents: list[Document], tokens: float | None = None) -> Schedule:
        text = lessons(documents, tokenizer, training)
        packs = family(checkpoints.open_config(arguments.folder).model_type).packs
        return Schedule(text, tokens or sum(map(len, text)), training, packs=packs, seed=0)

    learned = schedule(text[HELD_OUT:], arguments.steps * (arguments.context - 1))
    before = memory.resident()
    model = checkpoints.open_model(arguments.folder, getattr(torch, dtype), nf4=method == "qlora")
    if method != "full":
        adapters.attach(model, lora, seed=0)
    learner = Learner(model, build_objective(PLAIN, 0, 0, {}))
    with tempfile.TemporaryDirectory() as place:
        into, started = Path(place), time.process_time()
        done = fit(learner, learned, training, seed=0, into=into, runtime=Runtime())
        facts = {
            "peak_bytes": memory.peak(),
            "before_bytes": before,
            "speed": done.tokens / (time.process_time() - started),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "first": sum(loss for _, loss in done.losses[:3]) / 3,
            "last": sum(loss for _, loss in done.losses[-3:]) / 3,
            "merged": {},
        }
        if arguments.merging and method != "full":
            adapters.save(model, arguments.folder, lora, into / "adapter")
            del model, learner
            facts["merged"] = merging(arguments.folder, into, method, schedule(text[:HELD_OUT]))
    return facts


def merging(ancestor: Path, into: Path, method: str, heldout: Any) -> dict[str, float]:
    """Loss on held-out text of what an adapter can be added to, all computed in float32."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from deepfusion import adapters, checkpoints
    from deepfusion.config import LoRA
    from deepfusion.data.batches import collate
    from deepfusion.objectives import build_objective
    from deepfusion.students import PLAIN
    from deepfusion.training import Learner
    from deepfusion.weights import stored

    lora = LoRA()

    def loss(model: Any) -> float:
        learner = Learner(model.train(), build_objective(PLAIN, 0, 0, {}))
        with torch.no_grad():
            return sum(float(learner(**collate([heldout[n]]))["loss"]) for n in range(len(heldout))) / len(heldout)

    adapters.merge(ancestor, into / "adapter", lora, into=into / "merged")
    found = {
        "the ancestor, W": loss(checkpoints.open_model(ancestor)),
        "W + Δ in float32": loss(checkpoints.open_model(into / "merged")),
        "W + Δ rounded to bfloat16": loss(checkpoints.open_model(into / "merged", torch.bfloat16).float()),
    }
    if method == "qlora":
        quantised = checkpoints.open_model(ancestor, nf4=True)
        found["W in NF4"] = loss(quantised)
        adapters.attach(quantised, lora, seed=0)
        held = load_file(into / "adapter" / adapters.WEIGHTS)
        set_peft_model_state_dict(quantised, {name.removeprefix("base_model.model."): t for name, t in held.items()})
        found["W in NF4 + Δ"] = loss(quantised)
    own, merged = stored(ancestor), stored(into / "merged")
    lost = of = kept = error = 0.0
    for name in merged:
        w, exact = own[name].read().float(), merged[name].read()
        rounded = exact.bfloat16().float()
        if not torch.equal(w, exact):
            lost += int(((w == rounded) & (w != exact)).sum())
            of += w.numel()
            kept += float(torch.linalg.vector_norm(exact - w)) ** 2
            error += float(torch.linalg.vector_norm(exact - rounded)) ** 2
    found["share of the adapted weights that bfloat16 leaves as they were"] = lost / of
    found["rounding error of bfloat16, relative to Δ"] = (error / kept) ** 0.5
    return found


if __name__ == "__main__":
    main()
