"""Mix: a written text's teacher is its writer together with others, each heard as far as it knows the text so far.

One device knows a part of its subject. Whoever has learned in private what is being spoken of finds the words so far
likelier than its public ancestor does. So the teacher of token t is

    p(x_t | x_<t) = Σ_k w_k(t) p_k(x_t | x_<t),   w_k(t) ∝ Π_{s<t} p_k(x_s | x_<s) / q_k(x_s | x_<s),

where q_k is k's ancestor: the prediction of a Bayesian mixture whose evidence is what each has learned, and not how
good a language model it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from deepfusion import checkpoints
from deepfusion.artifacts import Checkpoint, Clusters, TransferSet, Upload, Work
from deepfusion.config import Runtime, TransferPhase
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import context_length
from deepfusion.precision import usable
from deepfusion.progress import Ticker
from deepfusion.signals import Signal, Signals
from deepfusion.store import link_tree
from deepfusion.writing import opinions

Opinion = tuple[
    np.ndarray, np.ndarray
]  # log-probabilities of a text's tokens `[n]`, and of what was kept beside `[n, k]`


def mix(
    transfer: TransferSet,
    uploads: Sequence[Upload],
    ancestors: Mapping[str, Checkpoint],
    clusters: Clusters,
    config: TransferPhase,
    *,
    others: int,
    into: Path,
    runtime: Runtime,
) -> TransferSet:
    """The transfer set with every device's signals mixed with those of `others` more devices on its text.

    Those are asked whose tokenizer is the writer's and whose text is most like its own; of what a text's writer kept, a
    mixture is made, so that what the others alone think possible joins the rest. Gains stay the writer's, and so does
    all of what proxies wrote. A device whose context a text exceeds is not heard on it.

    Args:
        transfer: as it was gathered.
        uploads: of all devices.
        ancestors: lineage → what a device of it started from.
        clusters: how alike devices are.
        config: the precision in which models are asked.
        others: how many, at most.
        into: the step's folder.
        runtime: how.

    Returns:
        The same documents, counts and notices; `work` is that of asking alone.
    """
    dtype = usable(config.dtype, runtime.accelerator, into)
    tokenizers = {
        lineage: Tokenizer(checkpoints.open_tokenizer(ancestor.folder)) for lineage, ancestor in ancestors.items()
    }
    spoken = {upload.device: tokenizers[upload.lineage].fingerprint for upload in uploads}
    held = {upload.device: upload for upload in uploads}
    written = sorted(transfer.signals.glob("*.safetensors"))
    ticker = Ticker(into, len(written), "writers")
    work = Work()
    for path in written:
        said = Signals.load(path)
        if path.stem in held:
            alike = dict(zip(clusters.devices, clusters.similarity[clusters.devices.index(path.stem)], strict=True))
            like = [name for name in held if name != path.stem and spoken[name] == said.tokenizer]
            like.sort(key=lambda name: -alike[name])  # which is stable
            heard = [held[name] for name in (path.stem, *like[:others])]
            said, asking = _mixed(said, heard, ancestors, tokenizers, dtype, runtime)
            work += asking
        said.save(into / "signals" / path.name)
        ticker.advance(1)
    if transfer.tokenizers.is_dir():
        link_tree(transfer.tokenizers, into / "tokenizers")
    shutil.copyfile(transfer.documents, into / transfer.documents.name)
    return transfer.model_copy(update={"folder": into, "work": work}).sealed()


def _mixed(
    said: Signals,
    heard: Sequence[Upload],
    ancestors: Mapping[str, Checkpoint],
    tokenizers: Mapping[str, Tokenizer],
    dtype: torch.dtype,
    runtime: Runtime,
) -> tuple[Signals, Work]:
    """One writer's signals as a mixture, and the work of asking; the writer is the first of those who are heard."""
    if len(heard) == 1:
        return said, Work()
    ids = {name: signal.ids for name, signal in said.of.items()}
    kept = {name: signal.topk_ids for name, signal in said.of.items()}
    work = Work()

    def asked(folder: Path, lineage: str, active: int, beside: Mapping[str, np.ndarray]) -> dict[str, Opinion]:
        nonlocal work
        model = checkpoints.open_model(folder, dtype, runtime.accelerator)
        longest = context_length(model.config)
        fitting = {name: tokens for name, tokens in ids.items() if longest is None or len(tokens) <= longest}
        tokens = sum(map(len, fitting.values()))
        work += Work(tokens=tokens, forward=float(tokens * active))
        return {name: (one, many) for name, one, many in opinions(model, tokenizers[lineage], fitting, beside)}

    before = {
        lineage: asked(ancestors[lineage].folder, lineage, ancestors[lineage].active_parameters, {})
        for lineage in dict.fromkeys(one.lineage for one in heard)
    }
    told = [(one.lineage, asked(one.model, one.lineage, one.active_parameters, kept)) for one in heard]
    of: dict[str, Signal] = {}
    for name, signal in said.of.items():
        opinions_on = [(found[name], before[lineage][name][0]) for lineage, found in told if name in found]
        of[name] = mixture(signal, opinions_on) if len(opinions_on) > 1 else signal
    return replace(said, of=of), work


def mixture(signal: Signal, told: Sequence[tuple[Opinion, np.ndarray]]) -> Signal:
    """A signal with the mixture's probabilities of what was kept; rows on which the writer had no opinion stay so.

    Args:
        signal: the writer's.
        told: of each who is heard, the writer among them, its opinion, and its ancestor's log-probabilities `[n]`.
    """
    spoken = np.stack([own for (own, _), _ in told]).astype(np.float64)
    weights = prefix_weights(spoken - np.stack([before for _, before in told]))
    logprobs = _log_sum(weights + spoken)
    topk = _log_sum(weights[..., None] + np.stack([many for (_, many), _ in told]).astype(np.float64))
    rows = np.arange(len(signal.ids)) > 0  # nothing predicts the start token
    changed = np.isfinite(signal.logprobs) & rows, np.isfinite(signal.topk_logprobs) & rows[:, None]
    return replace(
        signal,
        logprobs=np.where(changed[0], logprobs, signal.logprobs).astype(np.float32),
        topk_logprobs=np.where(changed[1], topk, signal.topk_logprobs).astype(signal.topk_logprobs.dtype),
    )


def prefix_weights(gained: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k n"]:
    """Log w_k(t): of all who are heard the same at first, then in proportion to what each has gained before token t.

    Args:
        gained: nats by which each finds each token likelier than its ancestor does; the first token's is 0.
    """
    so_far = np.cumsum(gained, axis=1) - gained
    return so_far - _log_sum(so_far)


def _log_sum(values: np.ndarray) -> np.ndarray:
    """Log Σ exp over the first axis."""
    return np.logaddexp.reduce(values, axis=0)
