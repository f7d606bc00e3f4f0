"""Sections on what a run cost, what it left out, and what it was asked to do."""

from __future__ import annotations

from collections.abc import Iterable

import yaml
from markupsafe import Markup

from deepfusion import figures
from deepfusion.artifacts import Work
from deepfusion.findings import RESULT, Compute, Findings, Traffic
from deepfusion.labels import label, left_out
from deepfusion.page.parts import Section, Table, percent

Totals = tuple[int, float, float, float, float]  # tokens; token-parameters: forward, backward, both, critical path
PHASES = {
    "data": "corpus made or read",
    "public": "the server's own text made or read, where devices are elsewhere",
    "make": "small models made and trained",
    "take": "given models checked",
    "device": "devices' training",
    "upload": "uploads checked",
    "materialise": "uploads made whole models",
    "cluster": "devices grouped",
    "proxy": "models averaged",
    "write": "devices' models answer and write",
    "transfer": "all that teaches gathered",
    "read": "what was written read by all who write",
    "agree": "what nobody else agrees with left out",
    "shift": "what devices learned put on top of the base",
    "mix": "writers' probabilities mixed with those of others",
    "task_vectors": "what was learned in the base's own weights added to it",
    "likelihoods": "who finds which text likeliest",
    "consult": "teachers asked",
    "joint": "joint student trained",
    "own_vector": "what a cluster learned in the base's own weights put into its branch",
    "branch": "branches trained",
    "assemble": "branches made into one MoE",
    "tune": "MoE tuned",
    "upcycle": "copies of the base made into an MoE, for references",
    "pooled_text": "control trained",
    "pooled_text_dense": "control trained",
    "dense_kd": "control trained",
    "ofa_joint": "baseline's joint student trained",
    "ofa_own_vector": "what a cluster learned in the base's own weights put into the baseline's branch",
    "ofa_branch": "baseline's branches trained",
    "ofa_assemble": "baseline's branches made into one MoE",
    "ofa_tune": "baseline's MoE tuned",
    "fedmkt_likelihoods": "who finds which text likeliest, for a baseline",
    "fedmkt_consult": "baseline's teachers asked",
    "fedmkt_joint": "baseline's joint student trained",
    "fedmkt_own_vector": "what a cluster learned in the base's own weights put into the baseline's branch",
    "fedmkt_branch": "baseline's branches trained",
    "fedmkt_assemble": "baseline's branches made into one MoE",
    "fedmkt_tune": "baseline's MoE tuned",
    "fedjets_start": "copies of the base made into an MoE, for a baseline",
    "fedjets_device": "devices' training of parts of an MoE, in rounds",
    "fedjets_round": "parts of a round averaged, expert by expert",
    "fedjets_best": "best round found by held-out text",
    "fedjets_tune": "best round's MoE tuned",
    "fedjets": "the better of the two found by held-out text",
    "fedavg_device": "devices' training of the base, in rounds",
    "fedavg_materialise": "uploads of a round made whole models",
    "fedavg_round": "models of a round averaged",
    "fedavg_dense": "best round found by held-out text",
    "btx_device": "devices' training of the base",
    "btx_materialise": "uploads for a baseline made whole models",
    "btx_branch": "models of a cluster averaged",
    "btx_merge": "branches made into one MoE",
    "btx": "baseline trained",
    "centralized": "upper bound trained",
    "evaluate": "test questions answered",
    "judge": "answers written, and graded by a judge",
}
UNITS = ((1e15, "10¹⁵ "), (1e12, "10¹² "), (1e9, "10⁹ "), (1e6, "10⁶ "), (1e3, "10³ "), (1.0, ""))


def compute(findings: Findings) -> Section | None:
    """Who computed how much: the equal-compute account."""
    if not findings.compute:
        return None
    systems = list(dict.fromkeys(part.system for part in findings.compute))
    totals = {system: _total(part for part in findings.compute if part.system == system) for system in systems}
    largest = max(total[3] for total in totals.values())
    divisor, unit = next(((number, unit) for number, unit in UNITS if largest >= number), UNITS[-1])
    ours = totals[RESULT][3] if RESULT in totals else 0.0
    rows: list[list[str]] = []
    strong: set[int] = set()
    for system, total in totals.items():
        parts = [part for part in findings.compute if part.system == system]
        rows += [[label(system), part.part, *_numbers(_total([part]), divisor), ""] for part in parts]
        strong.add(len(rows))
        rows.append([label(system), "total", *_numbers(total, divisor), f"{total[3] / ours:.2f}" if ours else ""])
    heads = ["system", "part", "tokens", "forward", "backward", "together", "critical path", "ratio"]
    text = (
        f"In {unit}token-parameters: a forward pass of one token counts the matrix parameters it passes through, a "
        "backward pass twice as many. What devices train is not among it; what their models write at the server is. "
        "Critical path: what must happen in sequence when every branch has a worker of its own. Ratio: to this run's "
        "total."
    )
    table = Table(heads, rows, texts=2, strong=frozenset(strong))
    return Section("compute", "Server compute", [text], tables=[table])


def _total(parts: Iterable[Compute]) -> Totals:
    listed = list(parts)
    work = sum((part.work for part in listed), Work())
    critical = sum(part.work.token_parameters if part.critical is None else part.critical for part in listed)
    return work.tokens, work.forward, work.backward, work.token_parameters, critical


def _numbers(total: Totals, divisor: float) -> list[str]:
    return [f"{total[0]:,}", *(f"{number / divisor:,.3f}" for number in total[1:])]


def traffic(findings: Findings) -> Section | None:
    """Bytes on the wire (Eq. 5 of arXiv 2602.14301), peak memory, and how each device trained."""
    up = findings.bytes_up()
    devices, server = findings.peaks()
    if not up and not devices:
        return None
    sent, received = sum(up.values()), sum(findings.bytes_down.values())
    text = [f"Devices sent {figures.size(sent)} in all, no raw text among it."] if sent else []
    text += [f"They were sent {figures.size(received)}."] if received else []
    if findings.wire:
        wire = findings.all_wire()
        text.append(
            "With all that Flower's messages add, and what came twice or came to nothing, "
            f"{figures.size(wire.up)} went to the server and {figures.size(wire.down)} to devices."
        )
    if devices or server is not None:
        text.append(
            "Memory is the peak of the step's process on the machine that ran it, libraries included, so tiny models "
            "show mostly those; the server's is that of its largest step. In the table it is the peak until training "
            "ended, and what of it was there before the model was opened: libraries and text."
        )
    figure = Markup(figures.costs(up, devices, server))
    listed = findings.devices()
    packed = any(device.codec for device in listed)
    heads = ["device", "model", "method", "sends", "weights", "trained", "sent", "peak memory", "before"]
    table = Table(
        [*heads, "lost, %"] if packed else heads,
        [
            [
                device.device,
                device.model_type,
                device.method,
                device.codec or device.sends,
                f"{device.parameters:,}",
                f"{device.trained_parameters:,}",
                figures.size(device.bytes),
                _measured(device.training_peak_bytes),
                _measured(device.before_bytes),
                *(["" if device.lost is None else percent(device.lost, 2)] if packed else []),
            ]
            for device in listed
        ],
        texts=4,
        caption="Lost: how far the model that the server unpacked is from the one that was trained, in per cent of how "
        "far training took it from its ancestor (L2)."
        if packed
        else "",
    )
    tables = [table, _of_baselines(findings)] if findings.baselines else [table]
    return Section("traffic", "Communication and memory", [" ".join(text)], figures=[figure], tables=tables)


def _of_baselines(findings: Findings) -> Table:
    own = Traffic(1, sum(findings.bytes_down.values()), sum(findings.bytes_up().values()))
    rows = [
        [label(name), f"{one.rounds:,}", figures.size(one.down), figures.size(one.up)]
        for name, one in {RESULT: own, **findings.baselines}.items()
    ]
    heads = ["system", "rounds", "sent to devices", "sent by devices"]
    return Table(heads, rows, texts=1, caption="All devices together, all rounds up to the best, which is the result.")


def _measured(count: int | None) -> str:
    return "" if count is None else figures.size(count)


def time(findings: Findings) -> Section | None:
    """Seconds by phase."""
    if not findings.steps:
        return None
    rows: list[list[str]] = []
    for name in dict.fromkeys(step.name for step in findings.steps):
        steps = [step for step in findings.steps if step.name == name]
        peaks = [step.peak_bytes for step in steps if step.peak_bytes is not None]
        seconds = [sum(step.seconds for step in steps), sum(step.cpu_seconds for step in steps)]
        tokens = sum(step.tokens or 0 for step in steps)
        row = [name, PHASES.get(name, ""), f"{len(steps):,}", *(f"{number:,.1f}" for number in seconds)]
        rows.append([*row, f"{tokens:,}" if tokens else "", figures.size(max(peaks)) if peaks else ""])
    heads = ["phase", "what it does", "steps", "seconds", "processor seconds", "tokens", "peak memory"]
    text = (
        "Summed over steps, several of which run at a time. Every step's time is that of the run that did the work, "
        "also where a later run found it done."
    )
    return Section("time", "Time", [text], tables=[Table(heads, rows, texts=2)])


def remarks(findings: Findings) -> Section:
    """Who was left out, and what a reader should be warned of."""
    rejected = findings.intake.rejected if findings.intake else ()
    items = [f"Left out: {left_out(r.device, r.reason)}" for r in rejected] + findings.all_warnings()
    return Section("remarks", "Left out, and warnings", items=items or ["No device was left out, nothing to warn of."])


def recipe(findings: Findings) -> Section:
    """What was asked for."""
    return Section("recipe", "Recipe", code=yaml.safe_dump(dict(findings.recipe), sort_keys=False, allow_unicode=True))
