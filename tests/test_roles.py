from concurrent.futures import Future
from pathlib import Path

import pytest

from deepfusion.artifacts import Clusters, Upload
from deepfusion.config import Models, Recipe, TransferPhase
from deepfusion.roles import Teacher, averaged, consulted, of_lineage, of_the_base, starting_points, writers

MADE = {"make": {"type": "gpt2"}}


def models(assign: str = "round_robin") -> Models:
    ancestors = dict.fromkeys("abc", MADE)
    return Models.model_validate({"base": {"make": {"type": "llama"}}, "ancestors": ancestors, "assign": assign})


def upload(device: str, model_type: str, lineage: str) -> Upload:
    return Upload(
        folder=Path(), device=device, ancestor="a", model_type=model_type, lineage=lineage, parameters=1,
        active_parameters=1, tokens=1, embedding="01", bytes=1,
    )  # fmt: skip


def grouped(*members: tuple[str, ...]) -> Clusters:
    devices = tuple(device for group in members for device in group)
    return Clusters(
        folder=Path(), k=len(members), members=members, similarity=(), devices=devices, centroids=("01",) * len(members)
    )


def test_devices_take_ancestors_in_turn_and_shift_every_round() -> None:
    devices = [f"d{n}" for n in range(6)]
    assert starting_points(devices, models(), 0) == {"d0": "a", "d1": "b", "d2": "c", "d3": "b", "d4": "c", "d5": "a"}


def test_ancestors_are_drawn_by_the_seed_alone() -> None:
    devices = [f"d{n}" for n in range(30)]
    drawn = [starting_points(devices, models("random"), seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0].values()) == {"a", "b", "c"}


def test_a_proxy_is_named_after_its_cluster_and_what_sets_it_apart() -> None:
    uploads = [
        upload("alone", "gpt2", "gpt2-x"),
        upload("one", "gpt2", "gpt2-x"),
        upload("other", "llama", "llama-y"),
        upload("left", "gpt2", "gpt2-x"),
        upload("right", "gpt2", "gpt2-z"),
        upload("beside", "llama", "llama-y"),
    ]
    clusters = grouped(("alone",), ("one", "other"), ("left", "right", "beside"), ())
    assert [
        (name, cluster, [one.device for one in members]) for name, cluster, members in averaged(uploads, clusters)
    ] == [
        ("cluster-0", 0, ["alone"]),
        ("cluster-1-gpt2", 1, ["one"]),
        ("cluster-1-llama", 1, ["other"]),
        ("cluster-2-gpt2-x", 2, ["left"]),
        ("cluster-2-gpt2-z", 2, ["right"]),
        ("cluster-2-llama", 2, ["beside"]),
    ]


def cast() -> tuple[list[Teacher], list[Teacher], Clusters]:
    """Three devices in two clusters, and a proxy of each cluster that is still to be made."""
    held = {device: upload(device, "gpt2", "gpt2-x") for device in ("a", "b", "c")}
    own = [Teacher(device, cluster, held[device]) for device, cluster in (("a", 0), ("b", 1), ("c", 0))]
    proxies = [Teacher(f"cluster-{n}", n, Future()) for n in range(2)]
    return own, proxies, grouped(("a", "c"), ("b",), ())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: ["a", "c"], 1: ["b"]}),
        ({"writers": "proxies"}, {0: ["cluster-0"], 1: ["cluster-1"]}),
        ({"max_writers": 1}, {0: ["cluster-0"], 1: ["b"]}),
        ({"kinds": ("public",)}, {}),
    ],
)
def test_who_writes(settings: dict[str, object], expected: dict[int, list[str]]) -> None:
    own, proxies, clusters = cast()
    names = {id(teacher.model): teacher.name for teacher in own + proxies}
    chosen = writers(own, proxies, clusters, TransferPhase.model_validate(settings))
    assert {cluster: [names[id(model)] for model in group] for cluster, group in chosen} == expected


@pytest.mark.parametrize(
    ("distill", "transfer", "expected"),
    [
        ({}, {}, []),
        ({"teachers": "proxies"}, {}, ["cluster-0", "cluster-1"]),
        ({"teachers": "likeliest"}, {}, []),
        ({"objective": {"kind": "vaa"}}, {}, ["a", "b", "c"]),
        ({"objective": {"kind": "vaa"}}, {"writers": "proxies"}, ["cluster-0", "cluster-1"]),
    ],
)
def test_who_is_asked_after_the_fact(
    distill: dict[str, object], transfer: dict[str, object], expected: list[str]
) -> None:
    own, proxies, _ = cast()
    tree = {"name": "x", "data": {"source": {"kind": "synthetic"}}, "models": models()}
    recipe = Recipe.model_validate(tree | {"distill": distill, "transfer": transfer})
    assert [teacher.name for teacher in consulted(own, proxies, recipe)] == expected


def test_the_base_is_told_among_ancestors_by_content() -> None:
    def asked(base: str, *others: str) -> bool:
        ancestors = {f"a{n}": {"path": other} for n, other in enumerate(others)} | {"made": MADE}
        return of_the_base(Models.model_validate({"base": {"path": base}, "ancestors": ancestors}))

    assert asked("models/small", "models/other", "models/small")
    assert asked("small@sha256:12", "copy@sha256:12")  # as they stand in keys
    assert not asked("small@sha256:12", "small@sha256:34")
    assert not asked("models/small", "models/other")
    assert not of_the_base(models())  # two that are made differ by their seeds


def test_proxies_of_one_lineage() -> None:
    uploads = [upload("d0", "llama", "x"), upload("d1", "gpt2", "y"), upload("d2", "llama", "x")]
    groups = averaged(uploads, grouped(("d0", "d1"), ("d2",)))
    proxies = [Teacher(name, cluster, members[0]) for name, cluster, members in groups]
    assert of_lineage("x", proxies, groups) == [proxies[0], proxies[2]]
    assert of_lineage("z", proxies, groups) == []
