"""The server's door: uploads are checked before anything reads them, and bytes counted (Eq. 5 of arXiv 2602.14301).

A broken, repeated or missing upload is left out by name; it never stops the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from deepfusion import checkpoints
from deepfusion.artifacts import Intake, Rejection, Upload
from deepfusion.encoders import decode
from deepfusion.progress import Ticker


def receive(uploads: Sequence[Upload], failures: Mapping[str, str], *, embedding_bytes: int, into: Path) -> Intake:
    """Accept what is whole, reject the rest with reasons.

    Args:
        uploads: What arrived, in the order of the devices. Of two under one name neither is taken: nothing tells which
            of them is the device's own.
        failures: Device → why its upload never arrived.
        embedding_bytes: The length of e_n that the recipe asks for (`device.embedding_bytes`).
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
                accepted[upload.device] = _inspect(upload, arrivals[upload.device], embedding_bytes)
            except (ValueError, OSError) as fault:
                rejected[upload.device] = _reason(upload, fault)
        ticker.advance(1)
    rejections = tuple(Rejection(device=device, reason=reason) for device, reason in rejected.items())
    if not accepted:
        reasons = "; ".join(rejected.values()) or "no device sent anything"
        raise ValueError(f"not one upload was accepted: {reasons}")
    return Intake(folder=into, accepted=tuple(accepted), rejected=rejections, bytes=accepted).sealed()


def upload_bytes(model: Path, embedding: bytes) -> int:
    """What one device sends: |m_n| + |e_n| (Eq. 5), every file of its checkpoint folder and its embedding.

    Raises:
        ValueError: the folder is missing, or holds something other than its own files.
    """
    return sum(path.stat().st_size for path in _files(model)) + len(embedding)


def _inspect(upload: Upload, arrivals: int, embedding_bytes: int) -> int:
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
    size = upload_bytes(upload.model, embedding)
    checkpoints.validate(upload.model)
    if (found := checkpoints.open_config(upload.model).model_type) != upload.model_type:
        raise ValueError(f"it declares a {upload.model_type} model but holds a {found} model")
    if size != upload.bytes:
        raise ValueError(f"it declares {upload.bytes} bytes but holds {size}")
    return size


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
    text = " ".join(str(fault).split()).replace(str(upload.model), "its model")
    return f"device {upload.device}: {text}"
