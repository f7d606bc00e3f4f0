"""What an MoE's router does: who is chosen where, and what is lost without each expert.

Works on every MoE whose router is a `…TopKRouter` module that returns (logits, gate weights, chosen experts), as
Mixtral's, Qwen's, OLMoE's and FlexOlmo's do in transformers, and ours of DeepSeek. Where experts are shards of
students' FFNs, those of one student are compared and removed together.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepfusion.families import Experts, experts
from deepfusion.metrics import mutual_information

Routed = tuple[Tensor, Tensor, Tensor]  # logits [tokens, E], gate weights [tokens, k], chosen experts [tokens, k]
DEAD_BELOW = 0.01


def routers(model: nn.Module) -> list[nn.Module]:
    """The router of every MoE layer, first layer first.

    Raises:
        ValueError: the model has none.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no router: evaluate it without routing")
    return found


def experts_of(model: nn.Module) -> Experts:
    """Number of experts in each MoE layer, of those that a token uses, and of students that they were cut from."""
    return experts(cast(Any, model).config)


@contextmanager
def recorded(model: nn.Module) -> Generator[list[Routed]]:
    """Collect what each router returns, layer by layer; the caller empties the list after each forward pass."""
    records: list[Routed] = []

    def keep(_module: nn.Module, _inputs: Any, output: Routed) -> None:
        records.append(output)

    handles = [router.register_forward_hook(keep) for router in routers(model)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_experts(model: nn.Module, removed: Sequence[int]) -> Generator[None]:
    """Inside, no token reaches these experts: their router logits are −∞, so others take their place and weight."""

    def masked(router: nn.Module, _inputs: Any, output: Routed) -> Routed:
        logits, scores, chosen = output
        logits = logits.clone()
        logits[:, list(removed)] = -torch.inf
        weights, indices = logits.float().softmax(-1).topk(chosen.shape[-1], dim=-1)
        # Mixtral has no such setting and always renormalises.
        if getattr(router, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(scores.dtype), indices

    handles = [router.register_forward_hook(masked) for router in routers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class RoutingTally:
    """Sums over tokens, per layer, domain and expert: router probabilities, gate weights and choices."""

    def __init__(self, layers: int, domains: Sequence[str], experts: int) -> None:
        self.domains = tuple(domains)
        shape = (layers, len(self.domains), experts)
        self.probability = torch.zeros(shape, dtype=torch.float64)
        self.weight = torch.zeros(shape, dtype=torch.float64)
        self.chosen = torch.zeros(shape, dtype=torch.float64)
        self.tokens = torch.zeros(len(self.domains), dtype=torch.float64)

    def add(self, routed: Sequence[Routed], domain: Int[Tensor, " tokens"]) -> None:
        """Count one forward pass; `domain` is each token's domain, −1 where the token is padding."""
        real = domain >= 0
        domain = domain[real]
        self.tokens.index_add_(0, domain, torch.ones(len(domain), dtype=torch.float64))
        for layer, (logits, scores, chosen) in enumerate(routed):
            probability = logits[real].double().softmax(-1).cpu()
            # Gate weights sum to 1 in Eq. 4; families that leave them unnormalised are made comparable.
            gate = scores[real].double().cpu()
            gate = torch.zeros_like(probability).scatter_(1, chosen[real].cpu(), gate / gate.sum(-1, keepdim=True))
            picks = torch.zeros_like(probability).scatter_(1, chosen[real].cpu(), 1.0)
            self.probability[layer].index_add_(0, domain, probability)
            self.weight[layer].index_add_(0, domain, gate)
            self.chosen[layer].index_add_(0, domain, picks)

    def summary(self) -> dict[str, Any]:
        """JSON facts.

        `probabilities[domain][layer][expert]`: mean softmax probability of the domain's tokens. `mutual_information`:
        per layer I(domain; expert) in nats, where a token is drawn evenly from all tokens and then an expert by the
        token's renormalised top-k gate weights; and its mean over layers. `load[layer][expert]`: share of all gate
        weight. `used[layer][expert]`: share of tokens with the expert among their top-k. `dead`: [layer, expert] used
        by less than `DEAD_BELOW` of the tokens.
        """
        present = [i for i, count in enumerate(self.tokens.tolist()) if count > 0]
        total = float(self.tokens.sum())
        mean = self.probability / self.tokens.clamp(min=1)[None, :, None]
        information = [mutual_information(layer) for layer in self.weight.tolist()]
        used = self.chosen.sum(1) / total
        return {
            "domains": [self.domains[i] for i in present],
            "tokens": {self.domains[i]: int(self.tokens[i]) for i in present},
            "layers": len(self.weight),
            "experts": self.weight.shape[-1],
            "probabilities": {self.domains[i]: mean[:, i].tolist() for i in present},
            "mutual_information": {"mean": sum(information) / len(information), "layers": information},
            "load": (self.weight.sum(1) / total).tolist(),
            "used": used.tolist(),
            "dead": (used < DEAD_BELOW).nonzero().tolist(),
        }


def expert_difference(model: nn.Module) -> dict[str, Any]:
    """How unlike experts are: per layer the mean over pairs of |w_i − w_j| / ((|w_i| + |w_j|) / 2), and its mean.

    w_i is all that was cut from student i: one expert, or several.
    """
    clusters = experts_of(model).clusters
    fused = [m for m in model.modules() if getattr(getattr(m, "gate_up_proj", None), "ndim", 0) == 3]
    layers = [
        mean_distance([cast(Tensor, part).unflatten(0, (clusters, -1)) for part in (m.gate_up_proj, m.down_proj)])
        for m in fused
    ]
    return {"mean": sum(layers) / max(1, len(layers)), "layers": layers}


@torch.no_grad()
def mean_distance(parts: Sequence[Tensor]) -> float:
    """Mean relative L2 distance over pairs of rows, each row spread over several tensors `[experts, …]`."""
    flat = [part.detach().float().flatten(1) for part in parts]
    norms: Float[Tensor, " experts"] = torch.stack([part.square().sum(1) for part in flat]).sum(0).sqrt()
    distances = [
        sum(float((part[i] - part[j]).square().sum()) for part in flat) ** 0.5 / float((norms[i] + norms[j]) / 2)
        for i in range(len(norms))
        for j in range(i)
    ]
    return sum(distances) / max(1, len(distances))
