"""The ClientApp of a device: it trains when it is ordered to, and keeps what it has made until the server has it.

Everything of a device is in its own file (`device.yaml`) and the store that this names. An order that comes again
(because the server was killed, or the device, or the line broke) finds the finished step in the store, and the same
bytes leave the device again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from pydantic import Field, ValidationError, model_validator

from deepfusion.artifacts import Checkpoint, Corpus, DeviceInfo, Upload
from deepfusion.config import Runtime, Section, TextSource, tree
from deepfusion.config.faults import explain
from deepfusion.data.corpora import PROMPT, read_private
from deepfusion.data.documents import Document, read_jsonl, write_jsonl
from deepfusion.engine import Engine
from deepfusion.errors import InputError, reading_inputs
from deepfusion.federation import messages
from deepfusion.federation.lines import Lines, print_line
from deepfusion.federation.manifest import Manifest, digest, private_key, sign
from deepfusion.federation.messages import Announcement, Order, Piece
from deepfusion.federation.project import DEVICE
from deepfusion.files import write_whole
from deepfusion.steps import STEPS
from deepfusion.store import Store

app = ClientApp()


class DeviceFile(Section):
    """What a device knows of itself, and tells nobody. Relative paths count from the file's folder."""

    name: str
    """The device's name, as the server has it."""
    key: str = "node.key"
    """Its private key, the one that `flower-supernode --auth-supernode-private-key` is given."""
    text: tuple[TextSource, ...] = ()
    """Its text: files or datasets with the fields of `data.source.sources` of a recipe; their private rows count."""
    prompt: str = PROMPT
    """Template of a prompt of `text`, which must be that of the server's recipe."""
    documents: str | None = None
    """In place of `text`: a file of documents (`id, domain, prompt, answer`), one JSON object a line."""
    ancestors: dict[str, str] = Field(default={})
    """Name of an ancestor in the server's recipe → the folder of this device's copy of it. It may be left out where the
    recipe says how it is made."""
    store: str = "store"
    """The folder for what the device makes: it trains once, and what is finished is sent again from here."""
    threads: int = Field(default=1, ge=1)
    """Torch threads."""

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if bool(self.text) == (self.documents is not None):
            raise ValueError("give exactly one of `text` and `documents`")
        return self

    @classmethod
    def load(cls, path: Path) -> DeviceFile:
        """Read a device's file, and make its paths absolute.

        Raises:
            InputError: names the file and the field at fault.
        """
        fields = tree.read(path, "device file")
        try:
            read = cls.model_validate(fields)
        except ValidationError as error:
            whose = f" of device {name}" if isinstance(name := fields.get("name"), str) else ""
            raise InputError(f"device file {path}{whose}: {explain(error, cls)}") from None
        here = path.parent.absolute()

        def at(name: str) -> str:
            return str(here / Path(name).expanduser())

        text = tuple(
            source if source.path is None else source.model_copy(update={"path": at(source.path)})
            for source in read.text
        )
        return read.model_copy(
            update={
                "key": at(read.key),
                "text": text,
                "documents": None if read.documents is None else at(read.documents),
                "ancestors": {name: at(folder) for name, folder in read.ancestors.items()},
                "store": at(read.store),
            }
        )

    def private(self) -> list[Document]:
        """The device's text."""
        if self.documents is None:
            return read_private(self.text, self.prompt)
        if not Path(self.documents).is_file():
            raise InputError(f"{self.documents} does not exist: set `documents` to the file of this device's text")
        return list(read_jsonl(Path(self.documents), Document))

    def check(self) -> dict[str, Any]:
        """See that all that it names is there and can be used.

        Returns:
            `name`, `rows` and `bytes` of its text, rows by `domains`, and the lineage of each of its `ancestors`.

        Raises:
            InputError: names what is missing or of no use.
        """
        private_key(Path(self.key))
        documents = self.private()
        if not documents:
            raise InputError(f"{self.name} has no private text: rows with another `split` than private are left out")
        return {
            "name": self.name,
            "rows": len(documents),
            "bytes": sum(len(document.text.encode()) for document in documents),
            "domains": dict(Counter(document.domain for document in documents)),
            "ancestors": {name: _lineage(_folder(name, copy)) for name, copy in self.ancestors.items()},
        }


def _lineage(folder: Path) -> str:
    from deepfusion import checkpoints  # transformers, which a process that sends a piece can do without

    with reading_inputs():
        checkpoints.validate(folder)
        return checkpoints.as_checkpoint(folder).lineage


def _folder(name: str, copy: str) -> Path:
    if not Path(copy).is_dir():
        raise InputError(f"ancestors.{name}: {copy} is not a folder")
    return Path(copy)


class Device:
    """A device that carries out orders."""

    def __init__(self, file: DeviceFile) -> None:
        self.file, self.store = file, Path(file.store)

    def carry_out(self, order: Order, texts: dict[str, bytes]) -> tuple[Announcement, Piece]:
        """Train, or find what was trained, and announce it with its first piece.

        Raises:
            ValueError: it cannot be done; says why.
        """
        private_key(Path(self.file.key))  # that it is no key is told now, and not after a training
        upload = self.trained(order, texts)
        content = Manifest.of(upload, order.digest).content
        known = digest(content)
        note = self._outbox(known)
        note.parent.mkdir(parents=True, exist_ok=True)
        where = {"folder": str(upload.folder.relative_to(self.store)), "manifest": json.loads(content)}
        write_whole(note, json.dumps(where))
        first = self.piece(known, 0, order.piece_bytes)
        return Announcement(content, sign(content, Path(self.file.key))), first

    def piece(self, of: str, offset: int, length: int) -> Piece:
        """Bytes of what was announced before, whichever process did.

        Raises:
            ValueError: nothing was announced by this digest.
        """
        note = self._outbox(of)
        if not of.isalnum() or not note.is_file():
            raise ValueError(f"there is no upload {of[:12]} here: has the store {self.store.name} been removed?")
        told = json.loads(note.read_text(encoding="utf-8"))
        manifest, folder = Manifest.model_validate(told["manifest"]), self.store / told["folder"]
        found, at = bytearray(), 0
        for entry in manifest.files:
            first, last = max(offset - at, 0), min(offset + length - at, entry.bytes)
            if first < last:
                with (folder / entry.name).open("rb") as stream:
                    stream.seek(first)
                    found += stream.read(last - first)
            at += entry.bytes
        return Piece(of, offset, bytes(found))

    def trained(self, order: Order, texts: dict[str, bytes]) -> Upload:
        """The finished upload, made now or earlier.

        Raises:
            InputError: the order is for another device, or of another ancestor than the device's copy.
        """
        if order.device != self.file.name:
            raise InputError(f"this device is {self.file.name}, and the order is for {order.device}: check `name`")
        corpus = self._corpus(texts)
        runtime = Runtime(workers=0, threads=self.file.threads)
        with Lines() as watch, Engine(Store(self.store / "steps"), runtime, watch) as engine:
            ancestor = self._ancestor(engine, order, corpus)
            function, gives, version = STEPS["device"]
            assert gives is Upload
            return engine.submit(
                "device", function, version, Upload, order.device, device=order.device, ancestor=ancestor,
                ancestor_name=order.ancestor, corpus=corpus, config=order.phase, seed=order.seed,
            ).result()  # fmt: skip

    def _ancestor(self, engine: Engine, order: Order, corpus: Corpus) -> Checkpoint:
        arguments: dict[str, Any]
        if (copy := self.file.ancestors.get(order.ancestor)) is not None:
            path = str(_folder(order.ancestor, copy))
            phase, arguments = "take", {"unkeyed": {"path": path}, "also_keyed_by": [copy, order.lineage]}
        elif order.made is not None:
            phase, arguments = "make", {"made": order.made, "corpus": corpus, "seed": order.made_seed}
        else:
            raise InputError(
                f"the order starts from {order.ancestor}, of which this device has no copy: name its folder under "
                "`ancestors`"
            )
        function, _, version = STEPS[phase]
        ancestor = engine.submit(phase, function, version, Checkpoint, order.ancestor, **arguments).result()
        if ancestor.lineage != order.lineage:
            raise InputError(
                f"this device's {order.ancestor} is {ancestor.lineage}, and the server's is {order.lineage}: they "
                "differ in weights, shapes or tokenizer, so get the server's own"
            )
        return ancestor

    def _corpus(self, texts: dict[str, bytes]) -> Corpus:
        """The device's own text and the server's public text, as the phases want them."""
        private = self.file.private()
        known = hashlib.sha256(repr(sorted(texts.items())).encode())
        known.update("".join(document.model_dump_json() for document in private).encode())
        folder = self.store / "text" / known.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("public.jsonl", "questions.jsonl", "heldout.jsonl", "test.jsonl"):
            (folder / name).write_bytes(texts.get(name, b""))
        name = self.file.name
        write_jsonl(folder / "private" / f"{name}.jsonl", private)
        size = sum(len(document.text.encode()) for document in private)
        info = DeviceInfo(id=name, domains={}, documents=len(private), bytes=size)
        return Corpus(folder=folder, domains=(), devices=(info,)).sealed()

    def _outbox(self, of: str) -> Path:
        return self.store / "outbox" / f"{of}.json"


def _device(context: Context) -> Device:
    """The device of this process, by its file: `--node-config 'file="device.yaml"'`."""
    return Device(DeviceFile.load(Path(str(context.node_config.get("file", DEVICE)))))


def _answer(message: Message, context: Context, act: Any) -> Message:
    """Do something for the server, which is told in one line, without a path of this machine, if it cannot be done."""
    device = None
    try:
        device = _device(context)
        announcement, piece = act(device)
        content = messages.reply(announcement, piece)
    except Exception as error:  # whatever it is, the server is to know, and this device's log has all of it
        print_line(f"{type(error).__name__}: {error}")
        line = " ".join(str(error).split()) if isinstance(error, ValueError) else type(error).__name__
        content = messages.reply(None, None, without_paths(line, _folders(device)))
    return Message(content, reply_to=message)


def without_paths(line: str, folders: Iterable[Path]) -> str:
    """What the server may read: where things lie on a device's machine is not its business.

    Args:
        line: what is to be told.
        folders: those of this machine that it may name; a name with spaces is known by this alone.
    """
    for folder in sorted({str(folder) for folder in folders if folder.parts[1:]}, key=len, reverse=True):
        line = line.replace(f"{folder}/", "").replace(folder, "…")
    return " ".join(re.sub(r".*[/\\\\](?=.)", "", word) for word in line.split(" "))


def _folders(device: Device | None) -> Iterator[Path]:
    """The folders that hold what an error of this device may name."""
    yield from (Path.cwd(), Path.home())
    if device is not None:
        file = device.file
        sources = (source.path for source in file.text)
        for name in (file.key, file.documents, file.store, *file.ancestors.values(), *sources):
            yield from (Path(name).parent,) if name else ()


@app.train()
def train(message: Message, context: Context) -> Message:
    """An order: train, and announce the upload."""

    def act(device: Device) -> tuple[Announcement, Piece]:
        return device.carry_out(*messages.read_order(message))

    return _answer(message, context, act)


@app.query("piece")
def piece(message: Message, context: Context) -> Message:
    """Send a piece of what is finished."""

    def act(device: Device) -> tuple[None, Piece]:
        return None, device.piece(*messages.read_ask(message))

    return _answer(message, context, act)


@app.query("verdict")
def verdict(message: Message, context: Context) -> Message:
    """Hear what became of the upload, and write it down beside the store."""

    def act(device: Device) -> tuple[None, None]:
        state, reason = messages.read_verdict(message)
        device.store.mkdir(parents=True, exist_ok=True)
        write_whole(device.store / "verdict.json", json.dumps({"state": state, "reason": reason}, indent=1))
        print_line(f"{device.file.name} is {state}{': ' * bool(reason)}{reason}")
        return None, None

    return _answer(message, context, act)
