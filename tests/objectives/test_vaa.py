import pytest
import torch
from torch import Tensor, nn

from deepfusion.alignment import patch_membership
from deepfusion.config import LogitsObjective, VAAObjective
from deepfusion.objectives import VAA, Logits, Predictions, build_objective
from deepfusion.objectives.vaa import pool, pool_patches, prepared, stage_ends, standardise, teacher_layers

torch.set_num_threads(1)


class Student(nn.Module):
    """Embeddings and two layers of width 6 over five words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        states = [self.embedding(ids)]
        for layer in self.layers:
            states.append(torch.tanh(layer(states[-1])))
        return self.head(states[-1]), tuple(states)


def config(**fields: object) -> VAAObjective:
    return VAAObjective.model_validate({"stages": 2, "patches": 2, "width": 4, "heads": 2, **fields})


def batch(documents: int = 3, tokens: int = 4) -> dict[str, Tensor]:
    """Each row is one document: its patches are its first and its second half."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (documents, tokens), generator=generator)
    patch = torch.arange(tokens) * 2 // tokens
    return {
        "input_ids": ids,
        "labels": torch.cat([ids[:, 1:], torch.full((documents, 1), -100)], 1),
        "weights": torch.ones(documents, tokens),
        "patch_documents": torch.arange(documents),
        "pool_token": torch.arange(documents * tokens),
        "pool_slot": (torch.arange(documents).unsqueeze(1) * 2 + patch).flatten(),
        "features:gpt2-a.b": torch.randn(documents, 2, 2, 3, generator=generator),
        "features_document:gpt2-a.b": torch.arange(documents),
    }


def objective(**fields: object) -> VAA:
    torch.manual_seed(1)
    return VAA(config(**fields), student_width=6, teacher_widths={"gpt2-a.b": 3, "llama": 7}, student_layers=2)


# ── pieces ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stages_are_as_equal_as_can_be():
    assert stage_ends(4, 2) == [2, 4]
    assert stage_ends(3, 2) == [1, 3]
    assert stage_ends(7, 3) == [2, 4, 7]
    assert stage_ends(3, 3) == [1, 2, 3]
    with pytest.raises(ValueError, match="2 layers cannot be cut into 3 stages"):
        stage_ends(2, 3)


def test_pooling_is_a_mean_of_member_tokens():
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0], [50.0, 60.0]])
    found = pool(hidden, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 3)
    assert found.tolist() == [[2, 3], [50, 60], [0, 0]]
    # Three tokens end at bytes 3, 5, 8; the second lies across the two patches of four bytes.
    found = pool_patches(hidden, patch_membership([3, 5, 8], 8, 2), 2)
    assert found.tolist() == [[2, 3], [26.5, 32]]


def test_standardise():
    features = torch.tensor([[[[1.0, 5.0]], [[30_000.0, 0.0]]], [[[3.0, 5.0]], [[10_000.0, 2.0]]]])
    found, mean, deviation = standardise(features)
    assert mean.tolist() == [[[2, 5]], [[20_000, 1]]]
    assert deviation.tolist() == [[[1, 1]], [[10_000, 1]]]
    assert found.tolist() == [[[[-1, 0]], [[1, -1]]], [[[1, 0]], [[-1, 1]]]]


def test_what_is_kept_of_a_teacher():
    assert teacher_layers(7, config(stages=3).features) == [2, 4, 7]
    assert teacher_layers(7, config(stages=3, teacher_layers="last").features) == [7, 7, 7]
    features = torch.tensor([[[[1.0, 5.0]], [[30_000.0, 0.0]]]])
    assert prepared(features, "none").tolist() == features.tolist()
    assert prepared(features, "dimension").tolist() == [[[[0, 0]], [[0, 0]]]]
    torch.testing.assert_close(prepared(features, "layer_norm"), torch.tensor([[[[-1.0, 1.0]], [[1.0, -1.0]]]]))
    with pytest.raises(ValueError, match=r"features reach 9e\+04, too much for float16: set objective.standardise"):
        prepared(3 * features, "none")


# ── feature matching ──────────────────────────────────────────────────────────────────────────────────────────────────


def fill(module: nn.Module, value: float) -> None:
    for name, parameter in module.named_parameters():
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else value)


# Eq. 8 of two patches with states 1 and 3, all widths 1: the first attends with weights softmax(1·1, 1·3), the second
# with softmax(3·1, 3·3).
FIRST, SECOND = (1 + 2 * torch.sigmoid(torch.tensor(gap)).item() for gap in (2.0, 6.0))


def by_hand(**fields: object) -> float:
    """FM of one stage, one document of two patches, a token each with states 1 and 3; the teacher's features are 1."""
    found = VAA(config(stages=1, width=1, heads=1, **fields), 1, {"t": 1}, 1)
    fill(found, 1.0)
    batch = {
        "patch_documents": torch.zeros(1),
        "pool_token": torch.tensor([0, 1]),
        "pool_slot": torch.tensor([0, 1]),
        "features:t": torch.tensor([[[[1.0], [1.0]]]]),
        "features_document:t": torch.tensor([0]),
    }
    state = torch.tensor([[[1.0], [3.0]]])
    return found.feature_matching(batch, [state, state]).item()


@pytest.mark.parametrize(
    ("fields", "aligned"),
    [
        ({}, (FIRST, SECOND)),
        ({"attention": False}, (1, 3)),
        ({"causal": True}, (1, SECOND)),  # the first patch sees itself alone
        ({"residual": True}, (1 + FIRST, 3 + SECOND)),
        ({"causal": True, "residual": True}, (2, 3 + SECOND)),
    ],
)
def test_feature_matching_by_hand(fields: dict[str, object], aligned: tuple[float, float]):
    assert by_hand(**fields) == pytest.approx(sum((value - 1) ** 2 for value in aligned) / 2, rel=1e-5)
    assert by_hand(matching="cosine", **fields) == pytest.approx(0, abs=1e-6)


def test_causal_attention_follows_the_text_through_all_stages():
    student, fields, vaa = Student(), batch(), objective(causal=True)
    _, states = student(fields["input_ids"])
    stages = [stage.detach().clone().requires_grad_() for stage in vaa._stages(fields, states)]
    assert vaa.attention is not None
    aligned = vaa.attention(stages)
    for patch, sees in ((0, [True, False]), (1, [True, True])):
        for stage in (0, 1):
            gradients = torch.autograd.grad(aligned[stage][0, patch].sum(), stages, retain_graph=True)
            assert [bool(g[0, p].abs().sum()) for g in gradients for p in (0, 1)] == sees * 2


def test_cosines_are_means_over_patches_and_sums_over_stages():
    student, fields, found = Student(), batch(), objective(matching="cosine", attention=False)
    _, states = student(fields["input_ids"])
    assert found.attention is not None
    mapped = found.attention.project(found.attention(found._stages(fields, states)), "gpt2-a.b")
    cosines = torch.cosine_similarity(torch.stack(mapped, 1), fields["features:gpt2-a.b"], dim=-1)
    torch.testing.assert_close(found.feature_matching(fields, states), 2 - cosines[:, 0].mean() - cosines[:, 1].mean())


def test_relations_need_no_projection():
    # Three patches of two documents, states 4, 6 and 5; see the same numbers in test_losses.py.
    found = VAA(config(stages=1, patches=1, matching="relational", attention=False), 1, {}, 1)
    assert not list(found.parameters())
    state = torch.tensor([[[4.0], [6.0]], [[5.0], [0.0]]], requires_grad=True)
    fields = {
        "patch_documents": torch.zeros(3),
        "pool_token": torch.tensor([0, 1, 2]),
        "pool_slot": torch.tensor([0, 1, 2]),
        "features:t": torch.tensor([[[[3.0]]], [[[0.0]]], [[[0.0]]]]),
        "features_document:t": torch.tensor([0, 1, 2]),
    }
    loss = found.feature_matching(fields, [state, state])
    assert loss.item() == pytest.approx(2 / 3)
    # A lineage of its own relates to no other: two patches, opposite to each other in any model, and one.
    fields |= {"features:t": fields["features:t"][:2], "features_document:t": torch.tensor([0, 1])}
    fields |= {"features:u": torch.tensor([[[[9.0]]]]), "features_document:u": torch.tensor([2])}
    assert found.feature_matching(fields, [state, state]).item() == pytest.approx(0)


def test_while_projections_warm_up_the_student_does_not_learn_of_features():
    student, fields, vaa = Student(), batch(), objective(warmup=2)

    def moved() -> bool:
        logits, states = student(fields["input_ids"])
        terms = vaa(fields, Predictions.of(logits), states)
        student.zero_grad()
        (terms["loss"] - Logits(vaa.config)(fields, Predictions.of(logits))["loss"]).backward()
        weight = student.layers[0].weight
        assert isinstance(weight, Tensor)
        return weight.grad is not None and bool(weight.grad.abs().max() > 1e-6)

    assert not moved()
    vaa.eval()
    assert moved()  # what is only looked at is no step
    vaa.train()
    assert [moved(), moved(), moved()] == [False, True, True]
    resumed = objective(warmup=2)
    resumed.load_state_dict(vaa.state_dict())
    assert resumed.taken == 4


def test_without_attention_it_is_plain_projection():
    student, fields, plain = Student(), batch(), objective(attention=False)
    _, states = student(fields["input_ids"])
    total = 0.0
    assert plain.attention is not None
    for stage, end in enumerate((1, 2)):
        pooled = states[end].unflatten(1, (2, 2)).mean(2)
        convolution = plain.attention.convolutions[stage]
        projection = plain.attention.projections[0][stage]
        mapped = projection(pooled @ convolution.weight.squeeze(-1).T + convolution.bias)
        total += (mapped - fields["features:gpt2-a.b"][:, stage]).square().mean()
    torch.testing.assert_close(plain.feature_matching(fields, states), total)


def test_attention_joins_the_stages_of_a_document_and_nothing_else():
    student, fields, vaa = Student(), batch(), objective()
    _, states = student(fields["input_ids"])
    early = states[1].detach().clone().requires_grad_()
    fields["features_document:gpt2-a.b"] = torch.tensor([1])
    fields["features:gpt2-a.b"] = fields["features:gpt2-a.b"][:1]
    assert vaa.attention is not None
    aligned = vaa.attention(vaa._stages(fields, (states[0], early, states[2].detach())))
    (gradient,) = torch.autograd.grad(aligned[1][1].sum(), early)
    assert gradient[1].abs().sum() > 0
    assert gradient[[0, 2]].abs().sum() == 0


def test_permuting_documents_changes_nothing_else():
    student, fields, vaa = Student(), batch(), objective()
    logits, states = student(fields["input_ids"])
    order = torch.tensor([2, 0, 1])  # document d is now row order.argsort()[d]
    permuted = dict(fields)
    permuted["labels"], permuted["weights"] = fields["labels"][order], fields["weights"][order]
    permuted["features:gpt2-a.b"] = fields["features:gpt2-a.b"][order]
    found = vaa(permuted, Predictions.of(logits[order]), tuple(state[order] for state in states))
    expected = vaa(fields, Predictions.of(logits), states)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    # Teachers' rows may come in any order too.
    fields["features_document:gpt2-a.b"] = order
    fields["features:gpt2-a.b"] = fields["features:gpt2-a.b"][order]
    torch.testing.assert_close(vaa(fields, Predictions.of(logits), states)["fm"], expected["fm"])


def test_teachers_count_by_document():
    student, fields, vaa = Student(), batch(), objective()
    _, states = student(fields["input_ids"])
    alone = vaa.feature_matching(fields, states)
    other = {key: value for key, value in fields.items() if "gpt2" not in key}
    other |= {"features:llama": torch.zeros(1, 2, 2, 7), "features_document:llama": torch.tensor([2])}
    both = vaa.feature_matching({**fields, **other}, states)
    torch.testing.assert_close(both, (3 * alone + vaa.feature_matching(other, states)) / 4)


# ── the objective ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_loss_adds_features_to_the_logits_objective():
    student, fields = Student(), batch()
    vaa = objective(alpha=0.5)
    logits, states = student(fields["input_ids"])
    terms, plain = (
        vaa(fields, Predictions.of(logits), states),
        Logits(LogitsObjective())(fields, Predictions.of(logits)),
    )
    assert set(terms) == {"ce", "kl", "span", "fm", "loss"}
    torch.testing.assert_close(terms["loss"], plain["loss"] + 0.5 * terms["fm"])


def test_gradient_reaches_the_student_and_every_projection_used():
    student, fields, vaa = Student(), batch(), objective()
    keys = set(student.state_dict())
    _, states = student(fields["input_ids"])
    vaa.feature_matching(fields, states).backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in student.layers)
    unused = {name for name, parameter in vaa.named_parameters() if parameter.grad is None}
    assert unused == {f"attention.projections.1.{stage}.{part}" for stage in (0, 1) for part in ("weight", "bias")}
    assert set(student.state_dict()) == keys == set(Student().state_dict())


def test_a_batch_without_features_trains_without_them():
    student, vaa = Student(), objective()
    fields = {key: value for key, value in batch().items() if not key.startswith(("features", "pool", "patch"))}
    logits, states = student(fields["input_ids"])
    terms = vaa(fields, Predictions.of(logits), states)
    assert terms["fm"].item() == 0
    assert terms["loss"].item() == pytest.approx((terms["ce"] + vaa.config.beta * terms["kl"]).item())


def test_features_can_be_fitted():
    torch.manual_seed(0)
    student, fields, vaa = Student(), batch(documents=2), objective(width=16)
    optimiser = torch.optim.Adam([*student.parameters(), *vaa.parameters()], lr=1e-2)
    losses = []
    for _ in range(300):
        _, states = student(fields["input_ids"])
        loss = vaa.feature_matching(fields, states)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert losses[-1] < 1e-3


def test_faults_are_named():
    student, fields, vaa = Student(), batch(), objective()
    logits, states = student(fields["input_ids"])
    with pytest.raises(ValueError, match="needs the 3 hidden states of 2 layers, not none"):
        vaa(fields, Predictions.of(logits))
    with pytest.raises(ValueError, match="no projection for teacher lineage opt"):
        vaa({**fields, "features:opt": fields["features:gpt2-a.b"]}, Predictions.of(logits), states)
    with pytest.raises(ValueError, match="width 4 is not a multiple"):
        objective(heads=3)


def test_build_objective():
    assert isinstance(build_objective(LogitsObjective(), 6, 2, {}), Logits)
    vaa = build_objective(config(), 6, 2, {"t": 3})
    assert isinstance(vaa, VAA)
    assert vaa.needs_hidden_states
    assert not Logits(LogitsObjective()).needs_hidden_states
