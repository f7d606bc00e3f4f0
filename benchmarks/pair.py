"""A real pair: the base of a finished run of `real_llms`, and its devices whose tokenizers are not the base's.

Arms of studies train the base for a while on what these devices wrote, and answer the run's test questions of private
groups. The seed of an arm is that of the order of its text.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfusion import Recipe, Runtime
from deepfusion.artifacts import RECORD, Checkpoint, Clusters, Corpus, Teaching, TransferSet, Upload
from deepfusion.checkpoints import open_tokenizer, tokenizer_fingerprint
from deepfusion.config import DistillPhase, EvaluatePhase
from deepfusion.data.documents import Question, ScoredQuestion, TransferDocument, read_jsonl, write_jsonl
from deepfusion.phases.consult import consult
from deepfusion.phases.distill import distill
from deepfusion.phases.evaluate import ROWS, evaluate
from deepfusion.signals import Signals
from deepfusion.worker import keep_freed_memory

METRICS = {"nats a byte, finance": "finance", "nats a byte, medical": "medical"}  # → domain
TOKENS = 30_000  # of training, if not said otherwise
HERE = Runtime(workers=0)


@dataclass(frozen=True)
class Pair:
    """What arms share."""

    base: Checkpoint
    transfer: TransferSet
    corpus: Corpus
    clusters: Clusters
    writers: tuple[Upload, ...]

    @classmethod
    def of(cls, run: Path, out: Path) -> Pair:
        """From a run's folder; the public text and what the foreign writers wrote go into `out`."""
        keep_freed_memory()
        base = Checkpoint.load(newest(run, "take", "base-*"))
        transfer = TransferSet.load(newest(run, "transfer"))
        own = tokenizer_fingerprint(open_tokenizer(base.folder))
        names = sorted(path.stem for path in transfer.signals.glob("*") if Signals.load(path).tokenizer != own)
        uploads = "materialise" if (run / "steps" / "materialise").is_dir() else "device"
        if not names:
            raise SystemExit(f"{run}: no device with another tokenizer than the base's has written anything")
        return cls(
            base,
            written_by(transfer, names, out / "transfer"),
            Corpus.load(newest(run, "data")),
            Clusters.load(newest(run, "cluster")),
            tuple(Upload.load(newest(run, uploads, f"{name}-*")) for name in names),
        )

    def teachings(self, config: DistillPhase, into: Path) -> list[Teaching]:
        """What the writers say when they are asked; found in `into` if they were asked already."""
        result: list[Teaching] = []
        for writer in self.writers:
            folder = into / writer.device
            if not (folder / RECORD).exists():
                folder.mkdir(parents=True, exist_ok=True)
                cluster = self.clusters.of(writer.device)
                consult(writer, cluster, self.transfer, config.consultation, into=folder, runtime=HERE)
            result.append(Teaching.load(folder))
        return result

    def trained(
        self, config: DistillPhase, tokens: int, seed: int, into: Path, teachings: Sequence[Teaching] = ()
    ) -> Checkpoint:
        """The base after so many tokens, from the beginning: what another arm has left is not to be gone on from."""
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        budget = 3.0 * self.base.active_parameters * tokens
        return distill(self.base, self.transfer, teachings, config, budget=budget, seed=seed, into=into, runtime=HERE)

    def scores(self, student: Checkpoint, out: Path) -> dict[str, float]:
        """Nats per answer byte."""
        asked, into = out / "questions.jsonl", out / "scores"
        into.mkdir(parents=True, exist_ok=True)
        private = [question for question in read_jsonl(self.corpus.test, Question) if question.private]
        write_jsonl(asked, [question.model_copy(update={"options": None, "answer_idx": None}) for question in private])
        how = EvaluatePhase(batch_tokens=2048, dtype="bfloat16")
        evaluate(student, asked, how, system="joint_student", item=None, into=into, runtime=HERE)
        rows = list(read_jsonl(into / ROWS, ScoredQuestion))
        parts = {metric: [row for row in rows if row.domain == domain] for metric, domain in METRICS.items()}
        return {
            metric: sum(row.answer_nats for row in part) / sum(row.answer_bytes for row in part)
            for metric, part in parts.items()
        }


def configured(objective: dict[str, Any]) -> DistillPhase:
    """The recipe's distillation with another objective, at the full rate; probabilities not shifted."""
    fields = {**Recipe.load("real_llms").distill.model_dump(), "shifted": False, "joint_rate": 1.0}
    return DistillPhase.model_validate({**fields, "objective": {**fields["objective"], **objective}})


def newest(run: Path, phase: str, pattern: str = "*") -> Path:
    """The folder of a finished step, the last one that was made."""
    found = [folder for folder in (run / "steps" / phase).glob(pattern) if folder.suffix != ".partial"]
    if not found:
        raise SystemExit(f"{run} has no finished step {phase}: let the recipe real_llms run there first")
    return max(found, key=lambda folder: folder.stat().st_mtime)


def written_by(transfer: TransferSet, names: Sequence[str], into: Path) -> TransferSet:
    """Public text, and what these writers wrote."""
    into.mkdir(parents=True, exist_ok=True)
    for name in ("signals", "tokenizers"):
        if not (into / name).exists():
            (into / name).symlink_to((transfer.folder / name).resolve())
    documents = read_jsonl(transfer.documents, TransferDocument)
    write_jsonl(into / "documents.jsonl", [one for one in documents if one.writer is None or one.writer in names])
    return transfer.model_copy(update={"folder": into})
