"""The server's door: uploads are checked before anything reads them, and bytes counted (Eq. 5 of arXiv 2602.14301).

A broken, repeated or missing upload is left out by name; it never stops the others. An accepted adapter is added to its
ancestor's weights, once, so that all that follows deals with whole models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from deepfusion import adapters, checkpoints
from deepfusion.artifacts import Checkpoint, Intake, Rejection, Upload, Work
from deepfusion.config import LoRA
from deepfusion.encoders import decode
from deepfusion.progress import Ticker


def receive(
    uploads: Sequence[Upload],
    failures: Mapping[str, str],
    *,
    embedding_bytes: int,
    ancestors: Mapping[str, Checkpoint] | None = None,
    lora: LoRA | None = None,
    into: Path,
) -> Intake:
    """Accept what is whole, reject the rest with reasons.

    Args:
        uploads: What arrived, in the order of the devices. Of two under one name neither is taken: nothing tells which
            of them is the device's own.
        failures: Device → why its upload never arrived.
        embedding_bytes: The length of e_n that the recipe asks for (`device.embedding_bytes`).
        ancestors: The recipe's name of each model that devices start from → the model; adapters need theirs.
        lora: The adapters that the recipe asks for; none: it asks for whole models.
        into: The step's folder.

    Raises:
        ValueError: nothing was accepted; lists the reasons.
    """
    arrivals = Counter(upload.device for upload in uploads)
    rejected = {device: f"device {device} never arrived: {failures[device]}" for device in sorted(failures)}
    accepted: dict[str, int] = {}
    ticker = Ticker(into, len(uploads), "uploads")
    for upload in uploads:
        if upload.device not in rejected:
            try:
                accepted[upload.device] = _inspect(
                    upload, arrivals[upload.device], embedding_bytes, (ancestors or {}).get(upload.ancestor), lora
                )
            except (ValueError, OSError) as fault:
                rejected[upload.device] = _reason(upload, fault)
        ticker.advance(1)
    rejections = tuple(Rejection(device=device, reason=reason) for device, reason in rejected.items())
    if not accepted:
        reasons = "; ".join(rejected.values()) or "no device sent anything"
        raise ValueError(f"not one upload was accepted: {reasons}")
    return Intake(folder=into, accepted=tuple(accepted), rejected=rejections, bytes=accepted).sealed()


def materialise(upload: Upload, ancestor: Checkpoint, lora: LoRA, *, into: Path, resume: bool = False) -> Upload:
    """An accepted adapter as the whole model that it stands for, in float32; memory holds the adapter and a block.

    Args:
        upload: with `adapter/`, and accepted.
        ancestor: what it was trained on.
        lora: its settings.
        into: the step's folder; `model/` in it becomes the model.
        resume: go on from what an interrupted attempt with the same arguments left in `into`.
    """
    adapters.merge(ancestor.folder, upload.sent, lora, into=into / "model", resume=resume)
    return upload.model_copy(update={"folder": into, "work": Work()}).sealed()


def upload_bytes(sent: Path, embedding: bytes) -> int:
    """What one device sends: |m_n| + |e_n| (Eq. 5), every file of its checkpoint's or adapter's folder, and e_n.

    Raises:
        ValueError: the folder is missing, or holds something other than its own files.
    """
    return sum(path.stat().st_size for path in _files(sent)) + len(embedding)


def _inspect(
    upload: Upload, arrivals: int, embedding_bytes: int, ancestor: Checkpoint | None, lora: LoRA | None
) -> int:
    """The bytes of a faultless upload.

    Raises:
        ValueError: what is wrong with it.
    """
    if upload.device in {"", ".."} or PurePath(upload.device).name != upload.device:
        raise ValueError("its name is not usable as a file name")
    if arrivals > 1:
        raise ValueError(f"{arrivals} uploads carry this name, so none of them is taken: device names must differ")
    decode(upload.embedding)
    embedding = bytes.fromhex(upload.embedding)
    if len(embedding) != embedding_bytes:
        raise ValueError(f"its embedding has {len(embedding)} bytes instead of {embedding_bytes}")
    # Links are refused before anything is opened: a model file must not lead to the server's own files.
    size = upload_bytes(upload.sent, embedding)
    if (upload.sends == "adapter") != (lora is not None):
        raise ValueError(f"it sends its {upload.sends} alone, which is not what device.upload asks for")
    if lora is not None:
        _inspect_adapter(upload, ancestor, lora)
    else:
        checkpoints.validate(upload.model)
        if (found := checkpoints.open_config(upload.model).model_type) != upload.model_type:
            raise ValueError(f"it declares a {upload.model_type} model but holds a {found} model")
    if size != upload.bytes:
        raise ValueError(f"it declares {upload.bytes} bytes but holds {size}")
    return size


def _inspect_adapter(upload: Upload, ancestor: Checkpoint | None, lora: LoRA) -> None:
    """See whether an adapter can be added to its ancestor, which is ours: what the device says of it must be true."""
    if ancestor is None or upload.lineage != ancestor.lineage:
        raise ValueError(f"its adapter is for {upload.ancestor} ({upload.lineage}), from which no device here starts")
    for fact in ("model_type", "parameters", "active_parameters"):
        if (said := getattr(upload, fact)) != (known := getattr(ancestor, fact)):
            raise ValueError(f"it declares {fact} {said}, but {upload.ancestor} has {known}")
    adapters.validate(upload.sent, ancestor.folder, lora)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing")
    home = folder.parent.resolve() / folder.name
    files: list[Path] = []
    for path in sorted([folder, *folder.rglob("*")]):
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a folder")
        if not path.resolve().is_relative_to(home):
            raise ValueError(f"{path} is a link that leads out of {folder}")
        if path.is_file():
            files.append(path)
    return files


def _reason(upload: Upload, fault: Exception) -> str:
    """One line that names the device and no folder of this machine: reasons are part of the result."""
    text = " ".join(str(fault).split()).replace(str(upload.sent), f"its {upload.sends}")
    return f"device {upload.device}: {text}"
