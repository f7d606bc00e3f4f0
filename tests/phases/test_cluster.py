from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.artifacts import Clusters, Upload
from deepfusion.config import ClusterPhase
from deepfusion.encoders import decode, quantise
from deepfusion.phases.cluster import adjusted_rand, cluster, group, purity, share_out, similarity_matrix

EAST, NORTH, UP = [100, 0, 0], [0, 100, 0], [0, 0, 100]


def upload(device: str, embedding: Sequence[float], lineage: str = "llama") -> Upload:
    return Upload(
        folder=Path(device),
        device=device,
        ancestor=lineage,
        model_type=lineage,
        lineage=lineage,
        parameters=1,
        active_parameters=1,
        tokens=1,
        embedding=quantise(np.array(embedding, dtype=float)).hex(),
        bytes=1,
    )


def fleet(*embeddings: Sequence[float]) -> list[Upload]:
    return [upload(f"d{n}", embedding) for n, embedding in enumerate(embeddings)]


def by_type(k: int) -> ClusterPhase:
    return ClusterPhase(k=k, mode="by_type")


def test_similarity_matrix_by_hand() -> None:
    similarity = similarity_matrix(np.array([[3.0, 4.0], [4.0, 3.0], [-4.0, 3.0]]))
    assert similarity.tolist() == [[1.0, 0.96, 0.0], [0.96, 1.0, -0.28], [0.0, -0.28, 1.0]]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(8, 64), st.integers(0, 99))
def test_similarity_is_a_cosine(devices: int, size: int, seed: int) -> None:
    similarity = similarity_matrix(np.random.default_rng(seed).standard_normal((devices, size)))
    assert (similarity == similarity.T).all()
    assert (np.diag(similarity) == 1).all()
    assert (np.abs(similarity) <= 1).all()


def test_devices_of_one_direction_share_a_cluster(tmp_path: Path) -> None:
    made = cluster(
        fleet(NORTH, EAST, [9, 100, 0], UP, [100, 9, 0], [5, 0, 100]), ClusterPhase(k=3), seed=0, into=tmp_path
    )
    assert made.members == (("d0", "d2"), ("d1", "d4"), ("d3", "d5"))
    assert made.devices == ("d0", "d1", "d2", "d3", "d4", "d5")
    assert made.warnings == ()
    assert np.array(made.similarity).shape == (6, 6)
    assert [made.of(device) for device in made.devices] == [0, 1, 0, 2, 1, 2]


def test_centroid_is_the_mean_direction(tmp_path: Path) -> None:
    made = cluster(fleet(EAST, NORTH), ClusterPhase(k=1), seed=0, into=tmp_path)
    assert decode(made.centroids[0]) == pytest.approx([0.5**0.5, 0.5**0.5, 0], abs=1e-3)


def test_result_is_sealed_and_repeats(tmp_path: Path) -> None:
    uploads = [upload(f"d{n}", np.random.default_rng(n).standard_normal(16).tolist()) for n in range(12)]
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    first, second = (cluster(uploads, ClusterPhase(k=4), seed=7, into=folder) for folder in folders)
    assert first.digest == second.digest
    assert Clusters.load(folders[0]) == first


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_every_device_is_in_one_cluster(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    devices = data.draw(st.integers(1, 10))
    k = data.draw(st.integers(1, devices))
    directions = st.sampled_from([EAST, NORTH, UP, [60, 80, 0], [59, 81, 0]])
    uploads = fleet(*[data.draw(directions) for _ in range(devices)])
    made = cluster(uploads, ClusterPhase(k=k), seed=0, into=tmp_path_factory.mktemp("clusters"))
    assert len(made.members) == len(made.centroids) == k
    assert sorted(device for members in made.members for device in members) == sorted(made.devices)
    distinct = len({u.embedding for u in uploads})
    filled = [members for members in made.members if members]
    assert len(filled) == min(k, distinct)
    assert filled == sorted(filled, key=lambda members: int(members[0][1:]))
    assert [bool(c) for c in made.centroids] == [bool(m) for m in made.members]
    assert len(made.warnings) == k - len(filled)


def test_too_few_distinct_devices_leave_clusters_empty(tmp_path: Path) -> None:
    made = cluster(fleet(EAST, NORTH, EAST, NORTH), ClusterPhase(k=4), seed=0, into=tmp_path)
    assert made.members == (("d0", "d2"), ("d1", "d3"), (), ())
    assert made.centroids[2:] == ("", "")
    assert made.warnings == (
        "cluster 2 is empty: only 2 distinct devices",
        "cluster 3 is empty: only 2 distinct devices",
    )


def test_one_device_is_a_cluster(tmp_path: Path) -> None:
    made = cluster(fleet(EAST), ClusterPhase(k=1), seed=0, into=tmp_path)
    assert made.members == (("d0",),)
    assert made.similarity == ((1.0,),)


def test_more_clusters_than_devices_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cluster\.k is 3 but there are only 2 accepted devices"):
        cluster(fleet(EAST, NORTH), ClusterPhase(k=3), seed=0, into=tmp_path)


def test_opposite_devices_have_no_centroid(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cancel out.*raise cluster\.k"):
        cluster(fleet(EAST, [-100, 0, 0]), ClusterPhase(k=1), seed=0, into=tmp_path)


def test_type_pure_clusters_hold_one_lineage(tmp_path: Path) -> None:
    uploads = [
        upload("a", EAST, "gpt2"),
        upload("b", EAST, "llama"),
        upload("c", NORTH, "gpt2"),
        upload("d", [100, 5, 0], "gpt2"),
        upload("e", NORTH, "llama"),
    ]
    made = cluster(uploads, by_type(3), seed=0, into=tmp_path)
    assert made.members == (("a", "d"), ("b", "e"), ("c",))


def test_type_pure_clusters_need_one_per_lineage(tmp_path: Path) -> None:
    uploads = [upload("a", EAST, "gpt2"), upload("b", EAST, "llama"), upload("c", EAST, "opt")]
    with pytest.raises(
        ValueError, match=r"cluster\.k is 2 but the devices have 3 lineages \(gpt2, llama, opt\): .* need at least 3"
    ):
        cluster(uploads, by_type(2), seed=0, into=tmp_path)


def test_empty_clusters_of_a_lineage_say_whose(tmp_path: Path) -> None:
    uploads = [upload("a", EAST, "gpt2"), upload("b", EAST, "gpt2"), upload("c", UP, "llama")]
    made = cluster(uploads, by_type(3), seed=0, into=tmp_path)
    assert made.members == (("a", "b"), ("c",), ())
    assert made.warnings == ("cluster 2 is empty: only 1 distinct devices of lineage gpt2",)


def test_group_numbers_clusters_by_first_appearance() -> None:
    assert group(np.array([[9.0], [0.0], [9.1], [0.1], [5.0]]), 3, seed=3) == [0, 1, 0, 1, 2]


def test_share_out_by_hand() -> None:
    assert share_out(3, [6, 5, 5]) == [1, 1, 1]
    assert share_out(4, [6, 5, 5]) == [2, 1, 1]  # one spare cluster: 5/13, 4/13, 4/13 of it
    assert share_out(4, [12, 4]) == [3, 1]  # two spare: 22/14 and 6/14
    assert share_out(5, [3, 3, 3]) == [2, 2, 1]  # equal remainders: the earlier
    assert share_out(10, [1, 9]) == [1, 9]


@pytest.mark.parametrize(("k", "sizes"), [(1, [2, 2]), (5, [2, 2])])
def test_share_out_refuses_the_impossible(k: int, sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{k} clusters cannot be split over 2 pools of 4 devices"):
        share_out(k, sizes)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.data())
def test_share_out_uses_all_and_fits(sizes: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(len(sizes), sum(sizes)))
    shares = share_out(k, sizes)
    assert sum(shares) == k
    assert all(1 <= share <= size for share, size in zip(shares, sizes, strict=True))


def test_agreement_with_domains_by_hand() -> None:
    made = Clusters(
        folder=Path(),
        k=3,
        members=(("a", "b", "c"), ("d",), ()),
        similarity=(),
        devices=("a", "b", "c", "d"),
        centroids=("01", "01", ""),
    )
    assert purity(made, {"a": "law", "b": "law", "c": "travel", "d": "travel"}) == 0.75
    assert purity(made, dict.fromkeys("abc", "law") | {"d": "travel"}) == 1.0
    assert adjusted_rand(made, dict.fromkeys("abc", "law") | {"d": "travel"}) == 1.0
    # pairs together: both 1, in the clusters 3, in the domains 2, of 6; expected 3·2/6 = 1, largest (3+2)/2
    assert adjusted_rand(made, {"a": "law", "b": "law", "c": "travel", "d": "travel"}) == pytest.approx(0.0)
