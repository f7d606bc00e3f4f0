import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepfusion import adapters, checkpoints
from deepfusion.artifacts import Checkpoint, Intake, Upload
from deepfusion.checkpoints import as_checkpoint, open_model
from deepfusion.config import LoRA
from deepfusion.encoders import quantise
from deepfusion.phases.upload import COHORT, Door, outliers, receive, upload_bytes
from pico import pico, pico_checkpoint

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


def test_a_fault_of_this_machine_is_not_the_devices(
    fleet: list[Upload], into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "validate", full)
    with pytest.raises(OSError, match="No space left"):
        admit(fleet, into)
    with pytest.raises(OSError, match="No space left"):
        Door(8, {}).look(fleet[0], into / "scratch")


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


# ── adapters ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LORA = LoRA(rank=2)


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return pico_checkpoint("gpt2", tmp_path_factory.mktemp("ancestor"))


@pytest.fixture
def adapters_sent(tmp_path: Path, ancestor: Checkpoint) -> list[Upload]:
    """Two faultless adapters, of a and b."""
    uploads: list[Upload] = []
    for device in "ab":
        model = open_model(ancestor.folder)
        adapters.attach(model, LORA, seed=ord(device))
        adapters.save(model, ancestor.folder, LORA, tmp_path / device / "adapter")
        upload = Upload(
            folder=tmp_path / device,
            device=device,
            ancestor="tiny",
            model_type="gpt2",
            lineage=ancestor.lineage,
            parameters=ancestor.parameters,
            active_parameters=ancestor.active_parameters,
            tokens=1,
            embedding=EMBEDDING.hex(),
            bytes=0,
            method="lora",
            sends="adapter",
        )
        uploads.append(changed(upload, bytes=upload_bytes(upload.sent, EMBEDDING)))
    return uploads


def turned_away(uploads: list[Upload], ancestors: dict[str, Checkpoint], into: Path) -> str:
    """The reason that the adapter of `a` is rejected, while that of `b` is accepted."""
    intake = receive(uploads, {}, embedding_bytes=8, ancestors=ancestors, lora=LORA, into=into)
    assert intake.accepted == ("b",)
    [rejected] = intake.rejected
    assert rejected.reason.startswith("device a: ")
    assert str(into.parent) not in rejected.reason
    return rejected.reason


def test_faultless_adapters_are_accepted(adapters_sent: list[Upload], ancestor: Checkpoint, into: Path) -> None:
    intake = receive(adapters_sent, {}, embedding_bytes=8, ancestors={"tiny": ancestor}, lora=LORA, into=into)
    assert intake.accepted == ("a", "b")
    assert intake.bytes == {upload.device: upload.bytes for upload in adapters_sent}


def harmed(upload: Upload, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = upload.sent / adapters.WEIGHTS
    held = load_file(file)
    change(held)
    save_file(held, file)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda a: harmed(a, lambda held: held.popitem()), "is missing"),
        (lambda a: harmed(a, lambda held: next(iter(held.values())).fill_(torch.inf)), "holds NaN or infinity"),
        (lambda a: (a.sent / adapters.WEIGHTS).write_bytes(b"x"), "is not a readable safetensors file"),
        (lambda a: (a.sent / adapters.CONFIG).write_text("{}"), "bias is None instead of none"),
        (lambda a: (a.sent / "adapter_model.bin").write_bytes(b"x"), "its adapter holds adapter_model.bin"),
        (lambda a: (a.sent / "more").symlink_to("/etc/hostname"), "its adapter/more is a link that leads out"),
        (lambda a: shutil.rmtree(a.sent), "its adapter is missing"),
    ],
)
def test_broken_adapters_are_left_out(
    harm: Callable[[Upload], object], words: str, adapters_sent: list[Upload], ancestor: Checkpoint, into: Path
) -> None:
    harm(adapters_sent[0])
    assert words in turned_away(adapters_sent, {"tiny": ancestor}, into)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"lineage": "gpt2-h32-l2-00000000"}, "its adapter is for tiny (gpt2-h32-l2-00000000), from which no device"),
        ({"ancestor": "huge"}, "its adapter is for huge (gpt2-h32-l2-"),
        ({"model_type": "llama"}, "it declares model_type llama, but tiny has gpt2"),
        ({"active_parameters": 1}, "it declares active_parameters 1, but tiny has "),
        ({"bytes": 7}, "it declares 7 bytes but holds "),
    ],
)
def test_what_is_said_of_an_adapter_must_be_true(
    said: dict[str, Any], words: str, adapters_sent: list[Upload], ancestor: Checkpoint, into: Path
) -> None:
    one, other = adapters_sent
    assert words in turned_away([changed(one, **said), other], {"tiny": ancestor}, into)


def test_what_is_sent_is_what_was_asked_for(
    fleet: list[Upload], adapters_sent: list[Upload], ancestor: Checkpoint, into: Path
) -> None:
    words = "it sends its model alone, which is not what device.upload asks for"
    assert words in turned_away([fleet[0], adapters_sent[1]], {"tiny": ancestor}, into)
    words = "it sends its adapter alone, which is not what device.upload asks for"
    assert words in rejection([adapters_sent[0], fleet[1]], into)


def test_one_that_is_far_from_all_others_stands_out() -> None:
    near = {f"d{number}": 1.0 + number / 10 for number in range(COHORT - 1)}
    assert list(outliers({"tiny": near | {"far": 30.0}})) == ["far"]
    assert "25 times as far from tiny as the median of 4" in outliers({"tiny": near | {"far": 28.75}})["far"]
    assert outliers({"tiny": near | {"far": 9.0}}) == {}
    assert outliers({"tiny": {"d0": 1.0, "d1": 1.0, "far": 1e6}}) == {}  # of three, nobody can say who is wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda u: alter(u, "wpe.weight", torch.zeros(3, 32)), "wpe.weight has shape (3, 32)"),
        (lambda u: alter(u, "wte.weight", torch.full((320, 32), 1e9)), "times as far from its ancestor's"),
        (lambda u: (u.model / "tokenizer.json").write_bytes(b" " * (2**26 + 1)), "and may have 67108864"),
        (lambda u: (u.model / "modeling.py").write_text("raise SystemExit"), "is no part of a checkpoint"),
    ],
)
def test_a_model_is_held_against_its_ancestor(
    change: Callable[[Upload], object], words: str, tmp_path: Path, checkpoint: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "ancestor")
    ancestor = as_checkpoint(tmp_path / "ancestor")
    facts = {name: getattr(ancestor, name) for name in ("lineage", "parameters", "active_parameters")}
    upload = changed(made(tmp_path, checkpoint, "a"), **facts)
    door = Door(8, {"tiny": ancestor})
    door.look(upload, tmp_path / "scratch")
    change(upload)
    with pytest.raises(ValueError, match="device a: ") as told:
        door.look(upload, tmp_path / "scratch")
    assert words in str(told.value)
    assert str(tmp_path) not in str(told.value)


DEEP = "[" * 20_000 + "]" * 20_000


def configured(upload: Upload, **fields: Any) -> None:
    config = upload.model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda u: (u.model / "config.json").write_text(f'{{"model_type": "gpt2", "x": {DEEP}}}'), "is not JSON"),
        (
            lambda u: (
                weights(u).rename(u.model / "x.safetensors")
                and (u.model / "model.safetensors.index.json").write_text(DEEP)
            ),
            "is not an index of safetensors files",
        ),
        (
            lambda u: configured(u, activation_function="relu"),
            "activation_function is relu, and its ancestor's is gelu",
        ),
        (lambda u: configured(u, n_head=1), "n_head is 1, and its ancestor's is 4"),
        (lambda u: configured(u, auto_map={"AutoModel": "x.Model"}), "auto_map is {'AutoModel': 'x.Model'}, and its"),
    ],
)
def test_what_a_device_says_never_stops_the_others(
    change: Callable[[Upload], object], words: str, fleet: list[Upload], checkpoint: Path, into: Path
) -> None:
    intake = held_against(change, fleet, checkpoint, into)
    assert intake.accepted == ("b",)
    assert words in intake.rejected[0].reason


def test_a_model_may_leave_out_the_prefix_of_its_names(fleet: list[Upload], checkpoint: Path, into: Path) -> None:
    def renamed(upload: Upload) -> None:
        held = load_file(weights(upload))
        held = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
        save_file(held, weights(upload), metadata={"format": "pt"})

    assert held_against(renamed, fleet, checkpoint, into).accepted == ("a", "b")


def held_against(change: Callable[[Upload], object], fleet: list[Upload], checkpoint: Path, into: Path) -> Intake:
    """The verdict on a, which is changed, and b, both of which say what is true of their ancestor."""
    shutil.copytree(checkpoint, into.parent / "ancestor")
    ancestor = as_checkpoint(into.parent / "ancestor")
    change(fleet[0])
    facts = {name: getattr(ancestor, name) for name in ("lineage", "parameters", "active_parameters")}
    uploads = [changed(one, **facts, bytes=upload_bytes(one.model, EMBEDDING)) for one in fleet]
    return receive(uploads, {}, embedding_bytes=8, ancestors={"tiny": ancestor}, into=into)


def test_one_that_is_far_and_says_what_is_not_true_is_left_out(checkpoint: Path, into: Path, tmp_path: Path) -> None:
    """Of those that are left out for what they say, none is held against the others."""
    uploads = [made(tmp_path, checkpoint, device) for device in "abcde"]
    for number, upload in enumerate(uploads):
        held = load_file(weights(upload))
        moved = {name: tensor + (3.0 if number == 0 else 0.01) for name, tensor in held.items()}
        save_file(moved, weights(upload), metadata={"format": "pt"})
    intake = held_against(lambda _: None, uploads, checkpoint, into)
    assert intake.accepted == tuple("bcde")
    assert "times as far from tiny as the median of 5" in intake.rejected[0].reason
    ancestor = as_checkpoint(into.parent / "ancestor")
    facts = {name: getattr(ancestor, name) for name in ("lineage", "parameters", "active_parameters")}
    lying = [changed(one, **facts, bytes=upload_bytes(one.model, EMBEDDING) + (one.device == "a")) for one in uploads]
    intake = receive(lying, {}, embedding_bytes=8, ancestors={"tiny": ancestor}, into=into)
    assert intake.accepted == tuple("bcde")
    assert "bytes but holds" in intake.rejected[0].reason


def test_an_adapter_that_moves_far_from_the_others_stands_out(
    adapters_sent: list[Upload], ancestor: Checkpoint, tmp_path: Path, into: Path
) -> None:
    uploads: list[Upload] = []
    for device in "abcd":
        shutil.copytree(adapters_sent[0].folder, tmp_path / f"of-{device}")
        one = changed(adapters_sent[0], folder=tmp_path / f"of-{device}", device=device)
        scale = 0.5 if device == "a" else 0.001
        harmed(one, lambda held, scale=scale: [tensor.fill_(scale) for tensor in held.values()])
        uploads.append(changed(one, bytes=upload_bytes(one.sent, EMBEDDING)))
    intake = receive(uploads, {}, embedding_bytes=8, ancestors={"tiny": ancestor}, lora=LORA, into=into)
    assert intake.accepted == tuple("bcd")
    assert "times as far from tiny" in intake.rejected[0].reason


def test_what_an_adapter_changes_by_hand(adapters_sent: list[Upload], ancestor: Checkpoint, tmp_path: Path) -> None:
    """The norm of the product is that of the merged weights less the ancestor's."""
    harmed(adapters_sent[0], lambda held: [tensor.normal_() for tensor in held.values()])
    adapters.merge(ancestor.folder, adapters_sent[0].sent, LORA, into=tmp_path / "merged")
    now, then = (load_file(place / "model.safetensors") for place in (tmp_path / "merged", ancestor.folder))
    squares = sum(float((now[name].double() - then[name].double()).norm()) ** 2 for name in now)
    assert adapters.change(adapters_sent[0].sent, LORA) == pytest.approx(squares**0.5, rel=1e-5)
