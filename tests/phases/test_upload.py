import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepfusion.artifacts import Intake, Upload
from deepfusion.encoders import quantise
from deepfusion.phases.upload import receive, upload_bytes
from pico import pico

EMBEDDING = bytes([1, 2, 3, 4, 5, 6, 7, 8])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def fleet(tmp_path: Path, checkpoint: Path) -> list[Upload]:
    """Two faultless uploads, a and b."""
    return [made(tmp_path, checkpoint, device) for device in "ab"]


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "intake").mkdir()
    return tmp_path / "intake"


def made(root: Path, checkpoint: Path, device: str) -> Upload:
    folder = root / f"upload-{device}"
    shutil.copytree(checkpoint, folder / "model")
    return Upload(
        folder=folder,
        device=device,
        ancestor="tiny",
        model_type="gpt2",
        lineage="gpt2-h32",
        parameters=1,
        active_parameters=1,
        tokens=1,
        embedding=EMBEDDING.hex(),
        bytes=sum(path.stat().st_size for path in (folder / "model").iterdir()) + 8,
    )


def changed(upload: Upload, **fields: Any) -> Upload:
    return upload.model_copy(update=fields)


def admit(uploads: list[Upload], into: Path, failures: dict[str, str] | None = None) -> Intake:
    return receive(uploads, failures or {}, embedding_bytes=8, into=into)


def rejection(uploads: list[Upload], into: Path) -> str:
    """The reason that `a` is rejected, while `b` is accepted."""
    intake = admit(uploads, into)
    assert intake.accepted == ("b",)
    assert list(intake.bytes) == ["b"]
    assert [rejected.device for rejected in intake.rejected] == ["a"]
    reason = intake.rejected[0].reason
    assert reason.startswith("device a: ")
    assert "\n" not in reason
    assert str(into.parent) not in reason
    return reason


def weights(upload: Upload) -> Path:
    return upload.model / "model.safetensors"


def alter(upload: Upload, name: str, tensor: torch.Tensor | None) -> None:
    """Replace a tensor, or take it out; names come without the model's prefix."""
    held = load_file(weights(upload))
    full = next(key for key in held if key.endswith(name))
    del held[full]
    if tensor is not None:
        held[full] = tensor
    save_file(held, weights(upload), metadata={"format": "pt"})


def test_bytes_add_up_by_hand(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_bytes(b"x" * 10)
    (tmp_path / "sub" / "model.safetensors").write_bytes(b"x" * 200)
    assert upload_bytes(tmp_path, EMBEDDING) == 10 + 200 + 8


def test_bytes_of_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent is missing"):
        upload_bytes(tmp_path / "absent", EMBEDDING)


def test_faultless_uploads_are_accepted_in_order(fleet: list[Upload], into: Path) -> None:
    intake = admit(fleet[::-1], into)
    assert intake.accepted == ("b", "a")
    assert intake.rejected == ()
    assert intake.bytes == {upload.device: upload.bytes for upload in fleet}
    assert Intake.load(into) == intake


def test_equal_uploads_give_equal_digests_wherever_they_lie(tmp_path: Path, checkpoint: Path) -> None:
    digests = set()
    for place in ("here", "there"):
        root = tmp_path / place
        uploads = [made(root, checkpoint, device) for device in "ab"]
        weights(uploads[0]).write_bytes(b"")
        (root / "intake").mkdir()
        digests.add(admit(uploads, root / "intake").digest)
    assert len(digests) == 1


def test_a_device_that_never_arrived_is_named(fleet: list[Upload], into: Path) -> None:
    intake = admit(fleet, into, {"z": "timed out after 600 s", "c": "connection refused"})
    assert intake.accepted == ("a", "b")
    assert [rejected.reason for rejected in intake.rejected] == [
        "device c never arrived: connection refused",
        "device z never arrived: timed out after 600 s",
    ]


def test_a_failed_device_is_not_taken_although_something_came(fleet: list[Upload], into: Path) -> None:
    intake = admit(fleet, into, {"a": "broke off"})
    assert intake.accepted == ("b",)
    assert [rejected.reason for rejected in intake.rejected] == ["device a never arrived: broke off"]


def test_two_uploads_under_one_name_are_both_left_out(fleet: list[Upload], into: Path) -> None:
    assert "2 uploads carry this name" in rejection([fleet[0], fleet[1], fleet[0]], into)


@pytest.mark.parametrize("name", ["../a", "", "..", "x/y"])
def test_names_that_leave_a_folder_are_refused(fleet: list[Upload], into: Path, name: str) -> None:
    intake = admit([changed(fleet[0], device=name), fleet[1]], into)
    assert intake.accepted == ("b",)
    assert "not usable as a file name" in intake.rejected[0].reason


@pytest.mark.parametrize(
    ("embedding", "words"),
    [
        (quantise(torch.ones(16).numpy()).hex(), "16 bytes instead of 8"),
        ("00" * 8, "all zero"),
        ("", "empty"),
        ("no hex", "not hex"),
    ],
)
def test_broken_embeddings_are_rejected(fleet: list[Upload], into: Path, embedding: str, words: str) -> None:
    assert words in rejection([changed(fleet[0], embedding=embedding), fleet[1]], into)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(fleet: list[Upload], into: Path, value: float) -> None:
    alter(fleet[0], "h.1.ln_1.weight", torch.full((32,), value))
    assert "h.1.ln_1.weight" in rejection(fleet, into)


def test_a_missing_tensor_is_named(fleet: list[Upload], into: Path) -> None:
    alter(fleet[0], "h.1.ln_1.weight", None)
    assert "h.1.ln_1.weight is missing" in rejection(fleet, into)


def test_a_tensor_of_another_shape_is_named(fleet: list[Upload], into: Path) -> None:
    alter(fleet[0], "h.1.ln_1.weight", torch.ones(33))
    assert "h.1.ln_1.weight has shape (33,) instead of (32,)" in rejection(fleet, into)


def test_truncated_weights_are_rejected(fleet: list[Upload], into: Path) -> None:
    whole = weights(fleet[0]).read_bytes()
    weights(fleet[0]).write_bytes(whole[: len(whole) // 2])
    assert "its model/model.safetensors is not a readable safetensors file" in rejection(fleet, into)


def test_a_missing_folder_is_rejected(fleet: list[Upload], into: Path) -> None:
    shutil.rmtree(fleet[0].model)
    assert "its model is missing" in rejection(fleet, into)


def test_a_missing_config_is_rejected(fleet: list[Upload], into: Path) -> None:
    (fleet[0].model / "config.json").unlink()
    assert "config.json" in rejection(fleet, into)


def test_an_unsupported_model_type_is_rejected(fleet: list[Upload], into: Path) -> None:
    config = fleet[0].model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "t5"}))
    assert "t5" in rejection(fleet, into)


def test_a_model_of_another_type_than_declared_is_rejected(fleet: list[Upload], into: Path) -> None:
    reason = rejection([changed(fleet[0], model_type="llama"), fleet[1]], into)
    assert reason == "device a: it declares a llama model but holds a gpt2 model"


def test_declared_bytes_must_be_true(fleet: list[Upload], into: Path) -> None:
    size = fleet[0].bytes
    reason = rejection([changed(fleet[0], bytes=size - 1), fleet[1]], into)
    assert reason == f"device a: it declares {size - 1} bytes but holds {size}"


def test_a_link_to_the_servers_files_is_refused(fleet: list[Upload], into: Path) -> None:
    secret = into.parent / "secret"
    secret.write_text("of the server")
    (fleet[0].model / "notes.txt").symlink_to(secret)
    assert "its model/notes.txt is a link that leads out of its model" in rejection(fleet, into)


def test_a_linked_folder_is_refused(fleet: list[Upload], into: Path) -> None:
    shutil.rmtree(fleet[0].model)
    fleet[0].model.symlink_to(fleet[1].model)
    assert "its model is a link" in rejection(fleet, into)


def test_a_link_within_the_folder_counts_its_target(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 7)
    (tmp_path / "b").symlink_to("a")
    assert upload_bytes(tmp_path, b"") == 14


def test_a_link_to_nothing_is_refused(fleet: list[Upload], into: Path) -> None:
    (fleet[0].model / "gone").symlink_to("nowhere")
    assert "its model/gone is neither a file nor a folder" in rejection(fleet, into)


def test_links_in_a_circle_are_refused(fleet: list[Upload], into: Path) -> None:
    (fleet[0].model / "x").symlink_to("y")
    (fleet[0].model / "y").symlink_to("x")
    assert "its model/x is neither a file nor a folder" in rejection(fleet, into)


def test_nothing_accepted_is_an_error_with_all_reasons(fleet: list[Upload], into: Path) -> None:
    with pytest.raises(
        ValueError, match=r"not one upload was accepted: device c never arrived: late; device a: .* zero"
    ):
        admit([changed(fleet[0], embedding="00" * 8)], into, {"c": "late"})
    with pytest.raises(ValueError, match="no device sent anything"):
        admit([], into)
