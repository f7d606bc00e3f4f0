"""Transfer: the text that carries what devices know to the students, and who knows which of it.

Private knowledge arrives only through what teachers say about private subjects. They answer public questions of their
own subjects and write text of their own; the probabilities they had while writing are kept with it and are its teacher.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from deepfusion import checkpoints
from deepfusion.artifacts import Checkpoint, Clusters, Corpus, Proxy, TransferSet, Upload, Work, Writing
from deepfusion.config import Runtime, TransferPhase
from deepfusion.data.documents import Document, TransferDocument, read_jsonl, write_jsonl
from deepfusion.data.hearing import keep_tokenizer
from deepfusion.data.tokens import Tokenizer
from deepfusion.encoders import PROJECTION_SEED, similarity_to
from deepfusion.phases.proxy import name_of
from deepfusion.precision import usable
from deepfusion.progress import Ticker
from deepfusion.signals import Signal, Signals
from deepfusion.store import link_tree
from deepfusion.writing import Written, prompt_nats, with_gain, write

NOTICE = (
    "The transfer text was written by devices' models: it can repeat private text word for word, and so can the "
    "students and the MoE trained on it."
)


@dataclass(frozen=True)
class Writer:
    """A model that writes: a device's own, or a proxy."""

    name: str
    folder: Path
    lineage: str
    tokens: int  # of private text behind it: its share of the writing
    active_parameters: int

    @classmethod
    def of(cls, model: Upload | Proxy, tokens: Mapping[str, int]) -> Writer:
        """A device's upload, or a proxy with the private tokens of its members."""
        if isinstance(model, Upload):
            return cls(model.device, model.model, model.lineage, model.tokens, model.active_parameters)
        members = sum(tokens.get(member, 1) for member in model.members)
        return cls(name_of(model), model.model, model.lineage, members, model.active_parameters)


def write_cluster(
    cluster: int,
    models: Sequence[Upload | Proxy],
    ancestors: Mapping[str, Checkpoint],
    clusters: Clusters,
    corpus: Corpus,
    config: TransferPhase,
    *,
    keep_before: bool = False,
    encoder: str,
    seed: int,
    into: Path,
    runtime: Runtime,
) -> Writing:
    """Let one cluster's models answer the public questions of its subjects and write text.

    A question belongs to the cluster whose centroid it resembles most; of the cluster's writers those answer who are
    most at home in its words: whose likelihood of the question per byte rose most over their ancestor's (`ancestors`:
    lineage → checkpoint). The number of written documents is fixed per cluster and shared by private tokens, so that
    the server's work does not grow with the number of devices. Each model is loaded once at a time. `keep_before` keeps
    what the writers' ancestors think of what was written beside what the writers think, as `shift` needs it.
    """
    writers, dtype = [Writer.of(model, {}) for model in models], usable(config.dtype, runtime.accelerator, into)
    questions = _questions_of(cluster, clusters, corpus, encoder) if "answered" in config.kinds else []
    to_answer, scoring = _who_answers(writers, ancestors, questions, config, dtype, runtime)
    wanted = config.written_per_cluster if "sampled" in config.kinds else 0
    share = _shares([writer.tokens for writer in writers], wanted)
    ticker = Ticker(into, sum(share) + sum(map(len, to_answer)), "documents")
    kept: list[TransferDocument] = []
    counts: Counter[str] = Counter({kind: 0 for kind in config.kinds if kind != "public"})
    texts: Counter[str] = Counter()
    by_writer: dict[str, int] = {}
    work = scoring
    for number, writer in enumerate(writers):
        model, tokenizer = _open(writer.folder, dtype, runtime)
        signals: dict[str, Signal] = {}
        for first, batch in _batches(to_answer[number], share[number], config.batch):
            kind = "sampled" if batch[0] is None else "answered"
            # A stream of numbers for every batch, of which each text has its own: where a model has changed in little,
            # only the texts in which a token falls otherwise change, and the luck of all others stays.
            stream = np.random.SeedSequence([seed, cluster, number, kind == "sampled", first]).generate_state(
                1, np.uint64
            )
            written = write(
                model,
                tokenizer,
                ["" if question is None else question.prompt for question in batch],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature if kind == "sampled" else config.answer_temperature,
                top_k=config.top_k,
                generator=torch.Generator(device=model.device).manual_seed(int(stream[0] >> np.uint64(1))),
            )
            tokens = sum(len(one.signal.ids) for one in written)
            work += Work(tokens=tokens, forward=float(tokens * writer.active_parameters))
            for place, (question, one) in enumerate(zip(batch, written, strict=True), first):
                fault = _fault(one, question, texts, config)
                if fault:
                    counts[f"dropped {kind}: {fault}"] += 1
                    continue
                texts[one.text] += 1
                counts[kind] += 1
                document = _document(one, question, writer.name, cluster, place)
                kept.append(document)
                signals[document.id] = one.signal
            ticker.advance(len(batch))
        if signals:
            ancestor, _ = _open(ancestors[writer.lineage].folder, dtype, runtime)
            signals = with_gain(signals, ancestor, tokenizer, keep_before=keep_before)
            tokens = sum(len(signal.ids) for signal in signals.values())
            work += Work(tokens=tokens, forward=float(tokens * writer.active_parameters))
            kept_as = into / "signals" / f"{writer.name}.safetensors"
            Signals(tokenizer.fingerprint, writer.lineage, signals).save(kept_as)
            keep_tokenizer(tokenizer.fingerprint, writer.folder, into / "tokenizers")
            by_writer[writer.name] = len(signals)
    write_jsonl(into / "documents.jsonl", kept)
    counts = Counter(dict(sorted(counts.items())))
    return Writing(folder=into, cluster=cluster, counts=counts, by_writer=by_writer, work=work).sealed()


def gather(
    writings: Sequence[Writing], clusters: Clusters, corpus: Corpus, config: TransferPhase, *, encoder: str, into: Path
) -> TransferSet:
    """Put the public text and everything written together; a public document is known by the cluster it resembles most.

    What was written from nothing is told apart into prompt and answer (`config.answer_after`).

    Raises:
        ValueError: there is no text at all.
    """
    documents: list[TransferDocument] = []
    counts: Counter[str] = Counter()
    if "public" in config.kinds:
        public = list(read_jsonl(corpus.public, Document))
        nearest = similarity_to(clusters.centroids, [d.text for d in public], encoder=encoder, seed=PROJECTION_SEED)
        documents += [
            TransferDocument(**document.model_dump(), kind="public", cluster=int(where))
            for document, where in zip(public, nearest.argmax(1), strict=True)
        ]
        counts["public"] = len(public)
    by_writer: dict[str, int] = {}
    unmarked, sampled = 0, 0
    for writing in writings:
        for document in read_jsonl(writing.documents, TransferDocument):
            documents.append(divided(document, config.answer_after))
            sampled += document.kind == "sampled"
            unmarked += document.kind == "sampled" and not documents[-1].prompt
        counts.update(writing.counts)
        by_writer |= writing.by_writer
        if writing.signals.is_dir():
            link_tree(writing.signals, into / "signals")
            link_tree(writing.tokenizers, into / "tokenizers")
    if not documents:
        raise ValueError("the transfer set is empty: nothing public, and every written document was dropped")
    write_jsonl(into / "documents.jsonl", documents)
    known = Counter(document.cluster for document in documents if document.kind != "public")
    silent = tuple(
        f"cluster {writing.cluster} teaches nothing: all that its models wrote was dropped "
        f"({', '.join(f'{n} {what}' for what, n in writing.counts.items() if what.startswith('dropped'))}): "
        "raise transfer.max_new_tokens, or device.epochs so that they learn to end a text"
        for writing in writings
        if not known.get(writing.cluster) and writing.counts
    )
    if config.answer_after is not None and unmarked:
        silent += (
            f"{unmarked} of {sampled} written texts have no {config.answer_after!r} with an answer behind it "
            "(transfer.answer_after): they count as answers from their beginning",
        )
    return TransferSet(
        folder=into,
        counts=dict(sorted(counts.items())),
        per_cluster=tuple(known.get(cluster, 0) for cluster in range(clusters.k)),
        by_writer=by_writer,
        private_text_risk=bool(by_writer),
        notices=((NOTICE,) if by_writer else ()) + silent,
        work=sum((writing.work for writing in writings), Work()),
    ).sealed()


def divided(document: TransferDocument, answer_after: str | None) -> TransferDocument:
    """The same text, its answer what stands behind the first `answer_after`; as it is if nothing does, or none."""
    if answer_after is None or document.prompt:
        return document
    before, mark, answer = document.answer.partition(answer_after)
    return document.model_copy(update={"prompt": before + mark, "answer": answer}) if answer else document


def _open(folder: Path, dtype: torch.dtype, runtime: Runtime) -> tuple[PreTrainedModel, Tokenizer]:
    model = checkpoints.open_model(folder, dtype, runtime.accelerator)
    return model, Tokenizer(checkpoints.open_tokenizer(folder))


def _questions_of(cluster: int, clusters: Clusters, corpus: Corpus, encoder: str) -> list[Document]:
    questions = list(read_jsonl(corpus.questions, Document))
    if not questions:
        return []
    near = similarity_to(clusters.centroids, [q.prompt for q in questions], encoder=encoder, seed=PROJECTION_SEED)
    return [question for question, row in zip(questions, near, strict=True) if int(row.argmax()) == cluster]


def _who_answers(
    writers: Sequence[Writer],
    ancestors: Mapping[str, Checkpoint],
    questions: Sequence[Document],
    config: TransferPhase,
    dtype: torch.dtype,
    runtime: Runtime,
) -> tuple[list[list[Document]], Work]:
    """Per writer the questions it answers, and the work of finding out."""
    if not questions or not writers:
        return [[] for _ in writers], Work()
    prompts = [question.prompt for question in questions]
    before: dict[str, np.ndarray] = {}
    gain = np.zeros((len(writers), len(questions)))
    work = Work()
    for number, writer in enumerate(writers):
        model, tokenizer = _open(writer.folder, dtype, runtime)
        passes = 1 if writer.lineage in before else 2  # an ancestor is asked once
        if writer.lineage not in before:
            ancestor, _ = _open(ancestors[writer.lineage].folder, dtype, runtime)
            before[writer.lineage] = prompt_nats(ancestor, tokenizer, prompts)
        gain[number] = before[writer.lineage] - prompt_nats(model, tokenizer, prompts)
        tokens = passes * sum(len(tokenizer.encode(prompt)[0]) + 1 for prompt in prompts)
        work += Work(tokens=tokens, forward=float(tokens * writer.active_parameters))
    chosen: list[list[Document]] = [[] for _ in writers]
    for column, question in enumerate(questions):
        for number in np.argsort(-gain[:, column], kind="stable")[: config.answers_per_question]:
            chosen[number].append(question)
    return chosen, work


def _batches(questions: Sequence[Document], texts: int, size: int) -> Iterator[tuple[int, Sequence[Document | None]]]:
    """What a writer is asked for at once, at most `size` of a kind: questions, then so many texts from nothing (None);
    each with the number, within its kind, of its first.
    """
    for jobs in (list(questions), [None] * texts):
        for first in range(0, len(jobs), size):
            yield first, jobs[first : first + size]


def _shares(tokens: Sequence[int], total: int) -> list[int]:
    """`total` cut in proportion to `tokens`, by largest remainder."""
    if not tokens or not total:
        return [0] * len(tokens)
    exact = np.array(tokens) / sum(tokens) * total
    share = np.floor(exact).astype(int)
    for index in np.argsort(share - exact, kind="stable")[: total - int(share.sum())]:
        share[index] += 1
    return share.tolist()


def _fault(one: Written, question: Document | None, texts: Counter[str], config: TransferPhase) -> str | None:
    """Why a written text is dropped, or None."""
    added = len(one.text.encode()) - (len(question.prompt.encode()) if question else 0)
    if not one.finished:
        return "unfinished"
    if added < (1 if question else config.min_bytes):
        return "too short"
    if texts[one.text] >= config.max_copies:
        return "duplicate"
    return None


def _document(one: Written, question: Document | None, writer: str, cluster: int, number: int) -> TransferDocument:
    if question is None:
        return TransferDocument(
            id=f"{writer}/s{number}", domain=f"cluster-{cluster}", answer=one.text,
            kind="sampled", writer=writer, cluster=cluster,
        )  # fmt: skip
    return TransferDocument(
        id=f"{writer}/a{number}", domain=question.domain, group=question.group,
        prompt=question.prompt, answer=one.text[len(question.prompt) :],
        kind="answered", writer=writer, cluster=cluster,
    )  # fmt: skip
