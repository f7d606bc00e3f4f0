"""What a device says of its upload before the first byte of it: facts, sizes and digests, signed by its own key."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deepfusion.artifacts import MANIFEST, RECORD, Upload, file_digest
from deepfusion.errors import InputError, one_line, read_file

MOST_BYTES = 2**20  # of a manifest
MOST_FILES = 4096
_NAME = re.compile(r"(model|adapter|packed)/[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".zst"}
_ALGORITHM = ec.ECDSA(hashes.SHA256())


class Entry(BaseModel):
    """One file of an upload."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str  # below the upload's folder
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """An upload in a few facts: its record (lineage and codec are among its fields), and its files in sending order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    order: str  # the digest of the order that it answers
    record: dict[str, Any]
    files: tuple[Entry, ...] = Field(min_length=1, max_length=MOST_FILES)

    @classmethod
    def of(cls, upload: Upload, order: str) -> Self:
        """Of a finished upload."""
        paths = sorted(path for path in upload.folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        named = [(path.relative_to(upload.folder).as_posix(), path) for path in paths]
        files = tuple(
            Entry(name=name, bytes=path.stat().st_size, sha256=file_digest(path))
            for name, path in named
            if name not in (RECORD, MANIFEST)
        )
        return cls(order=order, record=upload.model_dump(mode="json", exclude=Upload.not_recorded), files=files)

    @classmethod
    def read(cls, content: bytes) -> Self:
        """What a device sent.

        Raises:
            ValueError: it is no manifest, or names files that no upload has.
        """
        if len(content) > MOST_BYTES:
            raise ValueError(f"its manifest has {len(content)} bytes, and may have {MOST_BYTES}")
        try:
            made = cls.model_validate_json(content)
            facts = Upload(folder=Path(), **made.record)
        except ValidationError as error:
            raise ValueError(f"its manifest is not one: {first_fault(error)}") from None
        except TypeError:
            raise ValueError("its manifest is not one: its record is no mapping of facts") from None
        names = [entry.name for entry in made.files]
        for name in names:
            if len(name) > 200 or not _NAME.fullmatch(name) or Path(name).suffix not in _SUFFIXES:
                raise ValueError(f"its manifest names the file {name[:80]!r}, which no upload has")
            if name.partition("/")[0] != facts.sends:
                raise ValueError(f"its manifest names {name}, but it sends its {facts.sends}")
        if len(set(names)) < len(names):
            raise ValueError("its manifest names a file twice")
        return made

    @property
    def content(self) -> bytes:
        """The bytes that are signed and sent."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.bytes for entry in self.files)

    def upload(self, folder: Path) -> Upload:
        """The upload that these facts are about, in a folder."""
        return Upload(folder=folder, **self.record)


def digest(content: bytes) -> str:
    """By which a manifest, and so an upload, is known."""
    return hashlib.sha256(content).hexdigest()


def sign(content: bytes, key: Path) -> bytes:
    """A signature by the private key of an OpenSSH file.

    Raises:
        InputError: the file is no such key.
    """
    return private_key(key).sign(content, _ALGORITHM)


def verify(content: bytes, signature: bytes, key: Path) -> None:
    """Check a signature by the public key of an OpenSSH file.

    Raises:
        ValueError: it is not that key's.
    """
    try:
        public_key(key).verify(signature, content, _ALGORITHM)
    except InvalidSignature:
        raise ValueError("its manifest is not signed by the key of the device that it names") from None


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A device's own key, of an OpenSSH file.

    Raises:
        InputError: the file is not there, cannot be read, or is no such key.
    """
    content = read_file(path, "the device's private key")
    try:
        found = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is locked by a password
        found = None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise InputError(
            f"the device's private key {path} is not an elliptic-curve key of OpenSSH without a password: take the "
            "node.key that `deepfusion federation init` made for this device, or name it by `key` in the device file"
        )
    return found


def public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A device's key as the server has it, of an OpenSSH file.

    Raises:
        InputError: the file is not there, cannot be read, or is no such key.
    """
    content = read_file(path, "the device's public key")
    try:
        found = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, ec.EllipticCurvePublicKey):
        raise InputError(
            f"the device's public key {path} is not an elliptic-curve key of OpenSSH: take the one that "
            "`deepfusion federation init` made beside the device's node.key"
        )
    return found


def first_fault(error: ValidationError) -> str:
    """What is wrong with facts from elsewhere, in a line: the first of its faults."""
    fault = error.errors()[0]
    return one_line(f"{'.'.join(map(str, fault['loc']))[:80]}: {fault['msg']}", 200)
