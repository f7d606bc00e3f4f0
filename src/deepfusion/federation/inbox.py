"""The server's inbox: announced uploads, filled piece by piece, and what became of each.

`incoming/<device>/` holds what is under way, and what is there of it is known by the sizes of its files alone, so that
a server that is killed goes on where it was. `uploads/<device>/` holds whole uploads, exactly as the device has them.
`verdicts/<device>.json` says what was decided. All of it is idempotent: what comes twice changes nothing. But in the
ledger: `wire/<device>.json` counts the bytes of all messages, those that come twice too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from deepfusion.artifacts import Upload, Wire, file_digest
from deepfusion.federation.manifest import Entry, Manifest, digest, verify
from deepfusion.files import write_whole

_MANIFEST, _SIGNATURE = ".manifest.json", ".signature"  # hidden: no part of an artifact


class Verdict(BaseModel):
    """What was decided about a device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    state: Literal["accepted", "rejected"]
    reason: str = ""
    digest: str = ""  # of the manifest


@dataclass(frozen=True)
class Wanted:
    """What an upload under way still lacks."""

    digest: str
    offset: int
    size: int


class Inbox:
    """A folder that uploads arrive in; `keys` holds `<device>.pub` of every device that may send.

    Args:
        root: the folder.
        keys: the folder of public keys.
        check: raises a ValueError that says what is wrong with a whole upload.
        most_bytes: device → the most bytes that its upload may have.
    """

    def __init__(self, root: Path, keys: Path, check: Callable[[Upload], None], most_bytes: Mapping[str, int]) -> None:
        self.root, self.keys, self.check, self.most_bytes = root, keys, check, most_bytes
        self._decided: dict[str, Verdict] = {}  # whoever collects asks for all of them again and again

    def announce(self, device: str, order: str, content: bytes, signature: bytes) -> None:
        """A device says what it is about to send; the same again, and anything once it is accepted, changes nothing.

        Raises:
            ValueError: it may not send this.
        """
        if self.verdict(device):
            return
        verify(content, signature, self.keys / f"{device}.pub")
        manifest = Manifest.read(content)
        if (said := manifest.record["device"]) != device:
            raise ValueError(f"it sends an upload of {said[:80]!r}")
        if manifest.order != order:
            raise ValueError("its upload answers another order than it was given")
        if manifest.size > self.most_bytes[device]:
            raise ValueError(
                f"it announces {manifest.size} bytes, and no upload of its ancestor has more than "
                f"{self.most_bytes[device]}"
            )
        folder = self._incoming(device)
        if (folder / _SIGNATURE).is_file() and (folder / _MANIFEST).read_bytes() == content:
            return
        self._forget(device)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MANIFEST).write_bytes(content)
        (folder / _SIGNATURE).write_bytes(signature)  # last: with it the announcement is whole

    def wanted(self, device: str) -> Wanted | None:
        """Where to go on with an announced upload; None: nothing is announced. It is whole at `offset == size`."""
        if (manifest := self._manifest(device)) is None:
            return None
        held = sum(self._held(device, entry) for entry in manifest.files)
        return Wanted(digest(manifest.content), held, manifest.size)

    def add(self, device: str, of: str, offset: int, piece: bytes) -> None:
        """Bytes of an announced upload, from `offset` on; what is there already is passed over.

        Raises:
            ValueError: they are not what is missing.
        """
        wanted = self.wanted(device)
        if wanted is None or of != wanted.digest:
            return  # of an upload that is settled, or given up
        if not 0 <= offset <= wanted.offset:
            raise ValueError(f"it sends bytes from {offset} on, but those from {wanted.offset} on were asked for")
        if offset + len(piece) > wanted.size:
            raise ValueError(f"it sends more bytes than the {wanted.size} that it announced")
        left = memoryview(piece)[wanted.offset - offset :]
        for entry in self._files(device):
            lacks = entry.bytes - self._held(device, entry)
            path = self._incoming(device) / entry.name
            if lacks and left:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as stream:
                    stream.write(left[:lacks])
                left = left[lacks:]

    def settle(self, device: str) -> Verdict | None:
        """Decide about an upload whose bytes are all there; None: they are not, or not those that were announced.

        In the latter case, all are asked for again.
        """
        manifest, wanted = self._manifest(device), self.wanted(device)
        if manifest is None or wanted is None or wanted.offset < wanted.size:
            return None
        folder = self._incoming(device)
        for entry in manifest.files:
            path = folder / entry.name
            if not entry.bytes:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            if file_digest(path) != entry.sha256:
                for file in manifest.files:
                    (folder / file.name).unlink(missing_ok=True)
                return None
        upload = manifest.upload(folder).sealed()
        try:
            self.check(upload)
        except ValueError as fault:  # and no OSError: a full disk of the server's is no fault of the device
            self._forget(device)
            return self.decide(Verdict(device=device, state="rejected", reason=str(fault), digest=wanted.digest))
        target = self._accepted(device)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return self.decide(Verdict(device=device, state="accepted", digest=wanted.digest))

    def decide(self, verdict: Verdict) -> Verdict:
        """Write down what is decided."""
        _write(self.root / "verdicts" / f"{verdict.device}.json", verdict.model_dump_json(indent=1))
        self._decided[verdict.device] = verdict
        return verdict

    def verdict(self, device: str) -> Verdict | None:
        """What was decided about a device, if anything; nothing decides anew."""
        if device in self._decided:
            return self._decided[device]
        path = self.root / "verdicts" / f"{device}.json"
        if path.is_file():
            return self._decided.setdefault(device, Verdict.model_validate_json(path.read_bytes()))
        if (folder := self._accepted(device)).is_dir():  # killed between the renaming and the verdict
            known = digest((folder / _MANIFEST).read_bytes())
            return self.decide(Verdict(device=device, state="accepted", digest=known))
        return None

    def carried(self, device: str, *, up: int = 0, down: int = 0) -> None:
        """Add the bytes of a message to the ledger."""
        before = self.wire(device)
        _write(
            self.root / "wire" / f"{device}.json", Wire(up=before.up + up, down=before.down + down).model_dump_json()
        )

    def wire(self, device: str) -> Wire:
        """What the ledger says of a device, from the first start of collecting on."""
        path = self.root / "wire" / f"{device}.json"
        return Wire.model_validate_json(path.read_bytes()) if path.is_file() else Wire()

    def upload(self, device: str) -> Upload:
        """An accepted upload."""
        return Upload.load(self._accepted(device))

    def _incoming(self, device: str) -> Path:
        return self.root / "incoming" / device

    def _forget(self, device: str) -> None:
        """Remove what is under way, its signature first: without that, whatever a kill leaves of it is nothing."""
        folder = self._incoming(device)
        (folder / _SIGNATURE).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)

    def _accepted(self, device: str) -> Path:
        return self.root / "uploads" / device

    def _manifest(self, device: str) -> Manifest | None:
        folder = self._incoming(device)
        if not (folder / _SIGNATURE).is_file():
            return None
        return Manifest.read((folder / _MANIFEST).read_bytes())

    def _files(self, device: str) -> Iterator[Entry]:
        manifest = self._manifest(device)
        yield from manifest.files if manifest else ()

    def _held(self, device: str, entry: Entry) -> int:
        path = self._incoming(device) / entry.name
        return path.stat().st_size if path.is_file() else 0


def started(root: Path, now: float) -> float:
    """When collecting began, in seconds since the epoch; the first call decides it for all that follow."""
    path = root / "started.json"
    if not path.is_file():
        _write(path, json.dumps(now))
    return float(json.loads(path.read_text(encoding="utf-8")))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
