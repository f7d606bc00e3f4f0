"""Phase III, assembly: where the router's first rows come from.

A router row scores how much a hidden state looks like text of its cluster. Our reading, for the paper leaves it open:
the hidden states are those that enter each layer's FFN, which is what the router will see; they are measured in the
mean of the students, FFNs included, for no single student stands for all clusters, and the MoE needs a router to run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from deepfusion.artifacts import Checkpoint, Work
from deepfusion.checkpoints import open_config, open_model, open_tokenizer
from deepfusion.config import AssemblePhase, Runtime
from deepfusion.data.documents import Document
from deepfusion.data.tokens import Tokenizer
from deepfusion.families import family
from deepfusion.layouts import Layout, probability
from deepfusion.phases.proxy import average_folders

BATCH = 16
Ids = list[list[int]]  # tokenised documents, each with its start token


def measure_router(
    students: Sequence[Checkpoint],
    documents: Sequence[Sequence[Document]],
    config: AssemblePhase,
    layout: Layout,
    *,
    max_tokens: int,
    into: Path,
    runtime: Runtime,
    resume: bool = False,
) -> tuple[Path, Work]:
    """Rows of a router that sends each cluster's text to its expert, in a hidden safetensors file of `into`.

    Args:
        students: the K students, in the order of their clusters.
        documents: per cluster, text that it knows, the most telling first.
        config: how large the rows' logits become.
        layout: what the rows will choose among.
        max_tokens: about how many tokens of each cluster are looked at.
        into: where the file goes.
        runtime: where the mean of the students runs.
        resume: keep the file, or what there is of that mean, that an interrupted call with the same arguments left.

    Returns:
        The file, with `rows` [L, K, H], the `means` [L, K, H] they come from and the `spread` [L] of the logits before
        scaling; where weights are not renormalised, also `probability` [L] (see `layouts`). And the work of two passes
        over the text, or three.

    Raises:
        ValueError: there are not as many clusters of documents as students, or no text at all.
    """
    if len(documents) != len(students):
        raise ValueError(f"there are {len(students)} students, but text of {len(documents)} clusters")
    first, path = students[0], into / ".router.safetensors"
    tokenizer = Tokenizer(open_tokenizer(first.folder))
    context = min(getattr(open_config(first.folder), "max_position_embeddings", max_tokens), max_tokens)
    text = [_tokenised(cluster, tokenizer, max_tokens, context) for cluster in documents]
    if not (resume and path.is_file()):
        middle = into / ".mean"
        average_folders([student.folder for student in students], [1.0] * len(students), into=middle, resume=resume)
        model = open_model(middle, accelerator=runtime.accelerator)
        means = hidden_means(model, text)
        spread = logit_spread(model, text, centred(means))
        rows = router_from_means(means, spread, config.router_scale)
        found = {"rows": rows, "means": means, "spread": spread}
        if not layout.renormalised:
            found["probability"] = mean_probability(model, text, rows, layout)
        shutil.rmtree(middle)
        temporary = path.with_suffix(".tmp")
        save_file(found, temporary)
        temporary.replace(path)
    tokens = (2 if layout.renormalised else 3) * sum(len(ids) for cluster in text for ids in cluster)
    return path, Work(tokens=tokens, forward=float(tokens * first.active_parameters))


def router_from_means(
    means: Float[Tensor, "layers clusters hidden"], spread: Float[Tensor, " layers"], scale: float
) -> Float[Tensor, "layers clusters hidden"]:
    """Router rows: `centred(means)`, scaled so that logits of standard deviation `spread` get that of `scale`.

    A layer whose clusters all look alike (spread 0) gets rows of zeros.
    """
    factor = torch.where(spread > 0, scale / spread.clamp(min=torch.finfo(spread.dtype).tiny), 0.0)
    return centred(means) * factor[:, None, None]


def centred(means: Float[Tensor, "layers clusters hidden"]) -> Float[Tensor, "layers clusters hidden"]:
    """What sets each cluster's mean apart: without the mean over clusters, and without its direction.

    Hidden states have a large part in common. A row that is not at right angles to it scores every token alike, and one
    expert would be favoured whatever the text; the routers have no bias that could make up for it.
    """
    common = means.mean(dim=1, keepdim=True)
    direction = torch.nn.functional.normalize(common, dim=-1)
    apart = means - common
    return apart - (apart * direction).sum(dim=-1, keepdim=True) * direction


def hidden_means(model: PreTrainedModel, text: Sequence[Ids]) -> Float[Tensor, "layers clusters hidden"]:
    """Mean input of each layer's FFN over each cluster's tokens, start tokens left out; float32, on the CPU.

    A cluster without text gets the mean over the others, so that its row says nothing.

    Raises:
        ValueError: no cluster has any text.
    """
    found: list[Tensor | None] = []
    for cluster in text:
        total, count = None, 0
        for states in ffn_inputs(model, cluster):
            part = states.double().sum(dim=1)
            total, count = part if total is None else total + part, count + states.shape[1]
        found.append(None if total is None else total / count)
    held = [mean for mean in found if mean is not None]
    if not held:
        raise ValueError("no cluster has any text to measure router rows on: set assemble.router: random")
    common = torch.stack(held).mean(dim=0)
    return torch.stack([common if mean is None else mean for mean in found], dim=1).float()


def logit_spread(
    model: PreTrainedModel, text: Sequence[Ids], rows: Float[Tensor, "layers clusters hidden"]
) -> Float[Tensor, " layers"]:
    """Standard deviation of the router logits that `rows` give, over all tokens and experts; float32."""
    squares, sums, count = torch.zeros(len(rows)).double(), torch.zeros(len(rows)).double(), 0
    for cluster in text:
        for states in ffn_inputs(model, cluster):
            logits = torch.einsum("lth,lkh->ltk", states, rows).double()
            squares += logits.square().sum(dim=(1, 2))
            sums += logits.sum(dim=(1, 2))
            count += logits[0].numel()
    return (squares / count - (sums / count).square()).clamp(min=0).sqrt().float()


def mean_probability(
    model: PreTrainedModel, text: Sequence[Ids], rows: Float[Tensor, "layers clusters hidden"], layout: Layout
) -> Float[Tensor, " layers"]:
    """Mean over all tokens of `layouts.probability` with these rows; float32."""
    total, count = torch.zeros(len(rows)).double(), 0
    for cluster in text:
        for states in ffn_inputs(model, cluster):
            found = probability(torch.einsum("lth,lkh->ltk", states, rows), layout)
            total, count = total + found.sum(dim=1), count + found.shape[1]
    return (total / count).float()


def ffn_inputs(model: PreTrainedModel, text: Ids) -> Iterator[Float[Tensor, "layers tokens hidden"]]:
    """What enters the FFNs, batch by batch: float32, on the CPU, without start tokens and padding."""
    seen: list[Tensor] = []

    def note(_: object, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    layers = family(model.config.model_type).layer_list(model)
    hooks = [layer.get_submodule("mlp").register_forward_pre_hook(note) for layer in layers]
    try:
        for at in range(0, len(text), BATCH):
            rows = [torch.tensor(ids) for ids in text[at : at + BATCH]]
            # Padding stands at the end, where a causal model's other positions cannot see it.
            batch = pad_sequence(rows, batch_first=True).to(model.device)
            real = torch.arange(batch.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]
            real[:, 0] = False
            with torch.inference_mode():  # without the head: nobody asks for logits
                model.base_model(input_ids=batch, use_cache=False)
            yield torch.stack([states.float().cpu()[real] for states in seen])
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()


def _tokenised(documents: Sequence[Document], tokenizer: Tokenizer, max_tokens: int, context: int) -> Ids:
    """Start token and tokens of the first documents, cut to the context, until there are `max_tokens`."""
    text: Ids = []
    left = max_tokens
    for document in documents:
        ids, _ = tokenizer.encode(document.text)
        if left <= 0:
            break
        if ids:
            text.append([tokenizer.start, *ids][:context])
            left -= len(text[-1]) - 1
    return text
