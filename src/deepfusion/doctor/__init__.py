"""The doctor: looks at a recipe's text, models and machine before anything is trained, and says what a run will cost.

`text` reads what the data step would read, `models` opens what would be taken, `lengths` and `tokenizers` bring the
two together; `extent` and `work` say what each phase has to do, `memory`, `timing` and `costs` what that takes,
`machine` what there is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from deepfusion import encoders, pipeline, precision
from deepfusion.config import Recipe, Runtime
from deepfusion.data.tokens import Tokenizer
from deepfusion.doctor import costs, lengths, machine, models, text, timing, tokenizers
from deepfusion.doctor.diagnosis import Check, Cost, Diagnosis, Machine
from deepfusion.doctor.extent import Extent
from deepfusion.doctor.memory import peak
from deepfusion.doctor.models import BASE, Start
from deepfusion.doctor.text import Reading
from deepfusion.doctor.timing import Rates
from deepfusion.doctor.work import Task, size_of, worked_out
from deepfusion.elsewhere import refuse_what_needs_text
from deepfusion.inputs import missing
from deepfusion.judging import check
from deepfusion.labels import counted

__all__ = ["Check", "Cost", "Diagnosis", "Machine", "examine"]

FEW_STEPS = 20  # of the optimiser, below which a training does next to nothing
MEND_TEXT = "mend the file: docs/data.md says what a row must hold"
MEND_MODEL = "fetch or convert the folder again, or choose another: docs/models.md says what it must hold"
SAVED = 3  # times its weights that a training saves to go on from: they, and two averages of their gradients


def examine(recipe: Recipe, out: Path, runtime: Runtime, *, timed: bool = True) -> Diagnosis:
    """Look at everything that a run of `recipe` in `out` would use; nothing is trained, and nothing written there.

    Args:
        recipe: what would be run.
        out: where.
        runtime: how.
        timed: measure for some seconds how long this machine takes, with models of the run's shapes.
    """
    here = machine.look(out, runtime)
    written, widened, slow = recipe, list[str](), list[str]()
    if machine.available(runtime):
        recipe, widened, slow = precision.fitted(recipe, runtime.accelerator)
    with TemporaryDirectory() as scratch:
        found, tasks = _inputs(recipe, Path(scratch))
    found += machine.checks(here, runtime)
    found += machine.without_bfloat16(widened, slow, runtime)
    rates: Rates | None = None
    if tasks:
        rates = timing.measure(tasks, recipe, runtime) if timed and machine.available(runtime) else None
        found += _trainings(tasks)
        found += _room(recipe, tasks, here, runtime)
        found += _done(written, out)
    return Diagnosis(
        recipe=recipe.name,
        checks=tuple(found),
        costs=tuple(costs.phases(recipe, tasks, rates)),
        machine=here,
        seconds=costs.duration(tasks, rates, runtime) if rates else None,
    )


def _inputs(recipe: Recipe, scratch: Path) -> tuple[list[Check], list[Task]]:
    """What is to be said of text and models, and what a run would do; nothing where one of them cannot be used."""
    gone = dict(missing(recipe))
    found = [Check("text" if key.startswith("data.") else "models", key, "problem", told) for key, told in gone.items()]
    reading: Reading | None = None
    if not any(key.startswith("data.") for key in gone):
        try:
            reading = text.read(recipe, scratch)
            found += text.checks(reading, recipe)
        except ValueError as error:
            found.append(Check("text", "data", "problem", str(error), MEND_TEXT))
    refused = list(_refused(reading, recipe))
    found += refused
    starts: dict[str, Start] = {}
    words = [d.text for d in (*reading.public, *reading.questions)] if reading else []
    known: dict[int, Tokenizer] = {}
    for key, source in models.sources(recipe).items():
        if f"{key}.path" in gone or (source.make and reading is None):
            continue
        try:
            start = (
                models.made(key, source.make, words, known)
                if source.make
                else models.given(key, Path(str(source.path)))
            )
        except ValueError as error:
            found.append(Check("models", key, "problem", str(error), MEND_MODEL))
            continue
        starts[key] = start
        found += models.about(start)
        if key != BASE:
            ways = dict.fromkeys((way.method, way.lora) for way in recipe.device.ways if way.method != "full")
            found += [models.adapted(start, method, lora) for method, lora in ways]
    base = models.as_base(starts[BASE], recipe) if BASE in starts else None
    found += [base] if base else []
    if "device.encoder" not in gone:
        found += _encoder(recipe)
    found += models.trainings(starts, recipe)
    found += _judge(recipe)
    if reading is None or base is None or len(starts) < len(models.sources(recipe)):
        return found, []
    devices = [device.id for device in reading.corpus.devices]
    ancestors = {start.name: start for key, start in starts.items() if key != BASE}
    found += models.lineages(ancestors, devices, recipe, elsewhere=reading.elsewhere)
    found += models.of_the_base(starts[BASE], ancestors, devices, recipe)
    found += tokenizers.checks(starts, reading.public, recipe)
    measured = {start.tokenizer.fingerprint: lengths.Lengths(start.tokenizer) for start in starts.values()}
    found += lengths.checks(reading, starts, measured, recipe)
    return found, [] if refused or base.state == "problem" else worked_out(Extent(recipe, reading, starts, measured))


def _refused(reading: Reading | None, recipe: Recipe) -> Iterator[Check]:
    """What the recipe asks for and devices, or a federation's server, would refuse."""
    if reading is None:
        return
    try:
        if reading.elsewhere:
            refuse_what_needs_text(recipe)
        else:
            recipe.device.only_of([device.id for device in reading.corpus.devices])
    except ValueError as error:
        yield Check("text", "federation" if reading.elsewhere else "device.own", "problem", str(error))


def _encoder(recipe: Recipe) -> Iterator[Check]:
    """Whether texts can be embedded."""
    try:
        encoders.encode_texts(recipe.device.encoder, ["a text"])
    except ValueError as error:
        yield Check("models", "device.encoder", "problem", str(error), "choose another, or `hashing`")


def _judge(recipe: Recipe) -> Iterator[Check]:
    """Whether a judge can be asked, and that text goes to it."""
    if recipe.judge is None:
        return
    try:
        check(recipe.judge)
    except ValueError as error:
        yield Check("machine", "judge", "problem", str(error))
        return
    told = f"test questions, their answers and what models write are sent to {recipe.judge.url}"
    yield Check("machine", "judge", "ok", told)


def _trainings(tasks: Sequence[Task]) -> Iterator[Check]:
    """Trainings that are over before anything is learned."""
    for task in tasks:
        training = task.training
        if training is None or task.phase not in ("device", "joint") or not task.tokens:
            continue
        steps = task.tokens / (training.rows * training.context)
        if steps < FEW_STEPS:
            what = "device.min_steps" if task.phase == "device" else "distill.budget_tokens"
            yield Check(
                "training", task.phase, "warning",
                f"takes {counted(round(steps), 'step')} of {training.rows} rows of {training.context} tokens: too few "
                "to learn much",
                f"raise {what}, or lower {'device' if task.phase == 'device' else 'distill'}.training.rows",
            )  # fmt: skip


def _room(recipe: Recipe, tasks: Sequence[Task], here: Machine, runtime: Runtime) -> Iterator[Check]:
    """Whether memory and disk are enough."""
    yield machine.memory([(peak(task, recipe), task.phase) for task in tasks for _ in range(task.steps)], here, runtime)
    saved = [
        SAVED * task.shape.parameters * size_of(task.training.dtype) for task in tasks if task.shape and task.training
    ]
    working = sum(heapq.nlargest(max(1, runtime.workers), saved))
    yield machine.disk(sum(task.disk * task.steps for task in tasks), working, here)


def _done(recipe: Recipe, out: Path) -> Iterator[Check]:
    """What a run would find there already."""
    done = sum(step.state == "done" for step in pipeline.plan(recipe, out))
    if done:
        yield Check("machine", "--out", "ok", f"{out} has {done} steps of this run already: they cost nothing again")
