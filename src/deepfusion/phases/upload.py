"""The server's door: uploads are checked before anything reads them, and bytes counted (Eq. 5 of arXiv 2602.14301).

A broken, repeated or missing upload is left out by name; it never stops the others. What is accepted is unpacked, and
an adapter added to its ancestor's weights, once, so that all that follows deals with whole models.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from statistics import median

from deepfusion import adapters, checkpoints, codecs
from deepfusion.artifacts import Checkpoint, Intake, Rejection, Upload, Work
from deepfusion.config import Codec, LoRA, Sent
from deepfusion.descendants import Ancestor
from deepfusion.encoders import decode
from deepfusion.errors import one_line
from deepfusion.progress import Ticker
from deepfusion.weights import distance

TEXT_BYTES = 2**26  # the most that a file beside weights may have, such as a tokenizer's
SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".model"}  # of the files of a checkpoint
FARTHEST = 100.0  # from its ancestor, relative to that: what no training does
FARTHER = 10.0  # than the median of an ancestor's descendants, of which there are
COHORT = 4  # or more
OURS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)  # faults of this machine
SCRATCH = ".unpacked"  # for what is unpacked on the way: never part of an artifact


def receive(
    uploads: Sequence[Upload],
    failures: Mapping[str, str],
    *,
    embedding_bytes: int,
    ancestors: Mapping[str, Checkpoint] | None = None,
    lora: LoRA | None = None,
    codec: Codec | None = None,
    own: Mapping[str, Sent] | None = None,
    into: Path,
) -> Intake:
    """Accept what is whole, reject the rest with reasons.

    Args:
        uploads: What arrived, in the order of the devices. Of two under one name neither is taken: nothing tells which
            of them is the device's own.
        failures: Device → why its upload never arrived here.
        embedding_bytes: The length of e_n that the recipe asks for (`device.embedding_bytes`).
        ancestors: The recipe's name of each model that devices start from → the model; adapters, and what is packed,
            need theirs.
        lora: The adapters that the recipe asks for; none: it asks for whole models.
        codec: How the recipe asks for them to be packed; none: not at all.
        own: Device → what it is to send, where that is not what all are to.
        into: The step's folder.

    Raises:
        ValueError: nothing was accepted; lists the reasons.
        OSError: this machine has no room, or too many files open, to look at an upload.
    """
    arrivals = Counter(upload.device for upload in uploads)
    rejected = {device: f"device {device} never arrived: {failures[device]}" for device in sorted(failures)}
    accepted: dict[str, int] = {}
    door = Door(embedding_bytes, ancestors or {}, lora, codec, own or {})
    ticker = Ticker(into, len(uploads), "uploads")
    for upload in uploads:
        if upload.device not in rejected:
            try:
                accepted[upload.device] = door.inspect(upload, into / SCRATCH, arrivals[upload.device])
            except (ValueError, OSError) as fault:
                _refuse_ours(fault)
                rejected[upload.device] = _reason(upload, fault, into / SCRATCH)
        ticker.advance(1)
    noted = {name: {d: far for d, far in those.items() if d in accepted} for name, those in door.distances.items()}
    for device, reason in outliers(noted).items():
        del accepted[device]
        rejected[device] = f"device {device}: {reason}"
    rejections = tuple(Rejection(device=device, reason=reason) for device, reason in rejected.items())
    if not accepted:
        reasons = "; ".join(rejected.values()) or "no device sent anything"
        raise ValueError(f"not one upload was accepted: {reasons}")
    return Intake(folder=into, accepted=tuple(accepted), rejected=rejections, bytes=accepted).sealed()


def materialise(
    upload: Upload,
    ancestor: Checkpoint,
    lora: LoRA | None,
    *,
    codec: Codec | None = None,
    into: Path,
    resume: bool = False,
) -> Upload:
    """An accepted adapter, or packed upload, as the whole model that it stands for, in float32.

    Memory holds a few blocks, and the adapter if it is one.

    Args:
        upload: with `adapter/` or `packed/`, and accepted.
        ancestor: what it was trained on.
        lora: an adapter's settings.
        codec: how it is packed, if it is.
        into: the step's folder; `model/` in it becomes the model.
        resume: go on from what an interrupted attempt with the same arguments left in `into`.
    """
    model = into / "model"
    if codec is not None:
        codecs.unpack(upload.sent, ancestor.folder, codec, lora, into=model, scratch=into / SCRATCH, resume=resume)
    else:
        assert lora is not None
        adapters.merge(ancestor.folder, upload.sent, lora, into=model, resume=resume)
    return upload.model_copy(update={"folder": into, "work": Work()}).sealed()


def upload_bytes(sent: Path, embedding: bytes) -> int:
    """What one device sends: |m_n| + |e_n| (Eq. 5), every file of its checkpoint's or adapter's folder, and e_n.

    Raises:
        ValueError: the folder is missing, or holds something other than its own files.
    """
    return sum(path.stat().st_size for path in _files(sent)) + len(embedding)


@dataclass(frozen=True)
class Door:
    """What uploads are held against; what follows from an ancestor alone is worked out once, for the first of its own.

    Fields are as the arguments of `receive`.
    """

    embedding_bytes: int
    ancestors: Mapping[str, Checkpoint]
    lora: LoRA | None = None
    codec: Codec | None = None
    own: Mapping[str, Sent] = field(default_factory=dict[str, Sent])
    known: dict[str, Ancestor] = field(default_factory=dict[str, Ancestor], init=False)
    """By their names, once asked for."""
    contents: dict[tuple[str, Sent], codecs.Contents] = field(
        default_factory=dict[tuple[str, Sent], codecs.Contents], init=False
    )
    """Of packed uploads, by the ancestor's name."""
    distances: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]], init=False)
    """Ancestor → device → how far its model is from it, relative to it."""

    def look(self, upload: Upload, scratch: Path) -> None:
        """Look at one upload alone, as `receive` does; `scratch` is a folder for what is unpacked on the way.

        Raises:
            ValueError: what is wrong with it; names the device and no folder of this machine.
            OSError: this machine has no room, or too many files open, to look at it.
        """
        try:
            self.inspect(upload, scratch)
        except (ValueError, OSError) as fault:
            _refuse_ours(fault)
            raise ValueError(_reason(upload, fault, scratch)) from None

    def inspect(self, upload: Upload, scratch: Path, arrivals: int = 1) -> int:
        """The bytes of a faultless upload, of `arrivals` under its name.

        Raises:
            ValueError: what is wrong with it.
        """
        if upload.device in {"", ".."} or PurePath(upload.device).name != upload.device:
            raise ValueError("its name is not usable as a file name")
        if arrivals > 1:
            raise ValueError(f"{arrivals} uploads carry this name, so none of them is taken: device names must differ")
        decode(upload.embedding)
        embedding = bytes.fromhex(upload.embedding)
        if len(embedding) != self.embedding_bytes:
            raise ValueError(f"its embedding has {len(embedding)} bytes instead of {self.embedding_bytes}")
        # Links are refused before anything is opened: a model file must not lead to the server's own files.
        size = upload_bytes(upload.sent, embedding)
        for path in _files(upload.sent):
            if upload.sends == "model" and path.suffix not in SUFFIXES:
                raise ValueError(f"{path} is no part of a checkpoint")
            if path.suffix not in (".safetensors", ".zst") and path.stat().st_size > TEXT_BYTES:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, and may have {TEXT_BYTES}")
        sent = self.own.get(upload.device, Sent(lora=self.lora, codec=self.codec))
        if upload.sends != ("packed" if sent.codec else "adapter" if sent.lora else "model"):
            asks = "device.upload asks" if sent.codec is None and upload.sends != "packed" else "device.codec asks"
            raise ValueError(f"it sends its {upload.sends} alone, which is not what {asks} for")
        if sent.codec is not None:
            self._inspect_packed(upload, sent, sent.codec, scratch)
        elif sent.lora is not None:
            adapters.validate(upload.sent, self._ancestor(upload).folder, sent.lora)
            self._note(upload, adapters.change(upload.sent, sent.lora))
        else:
            ancestor = self._ancestor(upload) if self.ancestors else None
            if ancestor is None:
                checkpoints.validate(upload.model)
            else:
                self._known(upload).validate(upload.model)
            if (found := checkpoints.open_config(upload.model).model_type) != upload.model_type:
                raise ValueError(f"it declares a {upload.model_type} model but holds a {found} model")
            if ancestor is not None:
                self._compare(upload)
        if size != upload.bytes:
            raise ValueError(f"it declares {upload.bytes} bytes but holds {size}")
        return size

    def _compare(self, upload: Upload) -> None:
        """How far a model is from what it was trained from."""
        known = self._known(upload)
        # A device may leave out the prefix of its own names.
        self._note(
            upload, *distance(*(checkpoints.named_as(known.shapes, one) for one in (upload.model, known.folder)))
        )

    def _note(self, upload: Upload, changed: float, whole: float | None = None) -> None:
        """Note how far an upload is from its ancestor.

        Raises:
            ValueError: farther than training goes.
        """
        if whole is None:
            whole = self._known(upload).norm
        share = changed / whole if whole else changed
        if not share <= FARTHEST:
            raise ValueError(f"its weights are {share:.3g} times as far from its ancestor's as those are from zero")
        self.distances.setdefault(upload.ancestor, {})[upload.device] = share

    def _known(self, upload: Upload) -> Ancestor:
        """What follows from the ancestor of an upload, which has one here."""
        if upload.ancestor not in self.known:
            self.known[upload.ancestor] = Ancestor(self.ancestors[upload.ancestor].folder)
        return self.known[upload.ancestor]

    def _ancestor(self, upload: Upload) -> Checkpoint:
        """What an adapter or packed upload starts from, which is ours: what the device says of it must be true."""
        ancestor = self.ancestors.get(upload.ancestor)
        if ancestor is None or upload.lineage != ancestor.lineage:
            what = "adapter" if upload.sends == "adapter" else "upload"
            named = f"{upload.ancestor} ({upload.lineage})"
            raise ValueError(f"its {what} is for {named}, from which no device here starts")
        for fact in ("model_type", "parameters", "active_parameters"):
            if (said := getattr(upload, fact)) != (known := getattr(ancestor, fact)):
                raise ValueError(f"it declares {fact} {said}, but {upload.ancestor} has {known}")
        return ancestor

    def _inspect_packed(self, upload: Upload, sent: Sent, codec: Codec, scratch: Path) -> None:
        ancestor = self._ancestor(upload)
        if upload.packing is None or upload.packing.codec != codec.label:
            said = "no codec" if upload.packing is None else f"codec {upload.packing.codec}"
            raise ValueError(f"it declares {said}, but device.codec is {codec.label}")
        if (key := (upload.ancestor, sent)) not in self.contents:
            self.contents[key] = codecs.Contents.of(ancestor.folder, codec, sent.lora)
        found = codecs.check(upload.sent, self.contents[key], ancestor.folder, sent.lora, scratch=scratch)
        self._note(upload, found)


def _refuse_ours(fault: Exception) -> None:
    """Raise what went wrong if it is this machine's own fault, and not the upload's."""
    if isinstance(fault, OSError) and fault.errno in OURS:
        raise fault


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


def outliers(distances: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Device → why its model does not belong to the others: it is many times as far from their ancestor.

    Args:
        distances: Ancestor → device → how far its model is from it.
    """
    found: dict[str, str] = {}
    for ancestor, those in distances.items():
        if len(those) < COHORT:
            continue
        middle = median(those.values())
        for device, share in those.items():
            if share > FARTHER * middle > 0:
                found[device] = (
                    f"its weights are {share / middle:.3g} times as far from {ancestor} as the median of {len(those)} "
                    "devices"
                )
    return found


def _reason(upload: Upload, fault: Exception, scratch: Path) -> str:
    """One line that names the device and no folder of this machine: reasons are part of the result."""
    text = str(fault)
    for folder in (upload.sent, scratch):
        text = text.replace(str(folder), f"its {upload.sends}")
    return one_line(f"device {upload.device}: {text}")
