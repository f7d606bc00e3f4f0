"""The fuzzers' targets: bytes → something that a device, or the server, might send → what takes it in.

A target returns if what came was taken, or refused as documented, and fails in all other cases: on another error than a
ValueError, on time or memory beyond all measure, and on anything left behind that should not be there.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import zstandard
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from deepfusion.artifacts import Upload
from deepfusion.checkpoints import open_model, open_tokenizer
from deepfusion.config import DevicePhase
from deepfusion.federation import messages
from deepfusion.federation.inbox import Inbox, Verdict
from deepfusion.federation.manifest import Manifest, digest
from deepfusion.phases.upload import Door, materialise
from deepfusion.weights import stored
from draws import Draws, harm_bytes, harm_json, harm_tensors
from seeds import DEVICE, EMBEDDING, KINDS, Kind, world

SECONDS = 10.0  # of processor time that one input may take
MEMORY = 2**28  # bytes by which one input may raise the most memory that the process ever had
LINE = 1000  # characters of a reason
ORDER = "o"
MOST = 2**23  # bytes of an upload


# ── what must hold ────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def within_bounds() -> Iterator[None]:
    """Fail if what is done in here takes too much of the processor or of memory."""
    begun, before = time.process_time(), _most_memory()
    yield
    seconds, grown = time.process_time() - begun, _most_memory() - before
    assert seconds < SECONDS, f"{seconds:.1f} s of processor time"
    assert grown < MEMORY, f"{grown / 2**20:.0f} MiB of memory"


def _most_memory() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def in_a_line(reason: str) -> None:
    assert len(reason) <= LINE, f"a reason of {len(reason)} characters"
    assert reason.isprintable(), f"a reason that cannot be shown: {reason!r}"


@contextmanager
def refusals() -> Iterator[None]:
    """The one kind of error that may come out, in a line."""
    try:
        yield
    except ValueError as fault:
        in_a_line(" ".join(str(fault).split()))


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="input-", dir=world().root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def nothing_wrong(upload: Upload) -> None:
    assert upload.sent.is_dir()


# ── manifests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def manifest(data: bytes) -> None:
    """Any bytes, or a faultless manifest that was harmed, signed or not, to `Inbox.announce`."""
    draws, made = Draws(data), world()
    name = draws.one(list(KINDS))
    content = json.dumps(announced(made.records[name], {f: (len(c), f) for f, c in made.files[name].items()})).encode()
    shape = draws.below(4)
    if shape == 0:
        content = draws.data[draws.at :]
    else:
        for _ in range(shape):
            content = harm_json(content, draws) if draws.below(8) else harm_bytes(content, draws)
    signature = made.sign(content)
    if shape == 3 and draws.below(2):
        signature = harm_bytes(signature, draws)
    with scratch() as root:
        box = Inbox(root / "inbox", made.root / "keys", nothing_wrong, {DEVICE: MOST})
        with within_bounds():
            with refusals():
                box.announce(DEVICE, ORDER, content, signature)
            wanted = box.wanted(DEVICE)  # whatever was announced, the server goes on
        if wanted is None:
            assert not files(root), "a manifest that was refused left something behind"
            return
        assert 0 == wanted.offset <= wanted.size <= MOST
        read = Manifest.read(content)
        assert read.record["device"] == DEVICE
        assert all((root / entry.name).resolve().is_relative_to(root.resolve()) for entry in read.files)
        assert files(root) == {f"inbox/incoming/{DEVICE}/{file}" for file in (".manifest.json", ".signature")}


def announced(record: dict[str, Any], sent: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """A manifest's fields; of each file, its size and anything from which to make a digest."""
    entries = [{"name": n, "bytes": size, "sha256": digest(of.encode())} for n, (size, of) in sorted(sent.items())]
    return {"version": 1, "order": ORDER, "record": record, "files": entries}


# ── pieces ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """The process ends here; nothing catches it."""


class Life:
    """Whether the process lives: once `left` is 0, nothing that changes a file is done any more."""

    left: int | None = None

    @classmethod
    def watch(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.left is None or event not in {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}:
            return
        if event == "open" and not int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if cls.left == 0:
            raise Killed
        cls.left -= 1


@cache
def mortal() -> None:
    sys.addaudithook(Life.watch)


CONTENTS = (
    {"a.safetensors": b"0123456789", "config.json": b"{}", "empty.txt": b""},
    {"a.safetensors": b"9876543210987"},
)


def pieces(data: bytes) -> None:
    """Pieces of any place in any order, announcements of two uploads, and kills between any two changes of a file.

    Whatever has happened, a device that sends what it is asked for has its upload settled in the end, and the inbox
    holds that upload as it was sent, or nothing.
    """
    mortal()
    draws = Draws(data)
    refuses = bool(draws.below(2))

    def check(upload: Upload) -> None:
        if refuses:
            raise ValueError("device north: it is refused")

    made = small()
    with scratch() as root, within_bounds():

        def opened() -> Inbox:
            return Inbox(root / "inbox", world().root / "keys", check, {DEVICE: MOST})

        box = opened()
        while draws.more:
            _, content, stream = draws.one(made)
            Life.left = None if draws.below(4) else draws.below(8)
            try:
                with refusals():
                    _step(box, draws, content, stream)
            except Killed:
                Life.left = None
                box = opened()
            Life.left = None
        verdict = _in_the_end(opened(), *draws.one(made)[1:])
        state = files(root / "inbox")
        if verdict.state == "rejected":
            assert refuses
            assert state == {f"verdicts/{DEVICE}.json"}, f"a refused upload left {state}"
        else:
            assert not refuses
            [upload] = [one for one, content, _ in made if digest(content) == verdict.digest]
            kept = opened().upload(DEVICE)
            assert kept.digest == upload.digest
            assert files(kept.folder) == files(upload.folder) | {".manifest.json", ".signature"}
            assert {name.split("/")[0] for name in state} == {"uploads", "verdicts"}


@cache
def small() -> list[tuple[Upload, bytes, bytes]]:
    """Two uploads of a few bytes: each with its manifest, and the stream of its bytes."""
    made: list[tuple[Upload, bytes, bytes]] = []
    for number, contents in enumerate(CONTENTS):
        upload = _small(world().root / f"small-{number}", contents)
        stream = b"".join(contents[name] for name in sorted(contents))
        made.append((upload, Manifest.of(upload, ORDER).content, stream))
    return made


def _small(folder: Path, contents: Mapping[str, bytes]) -> Upload:
    (folder / "model").mkdir(parents=True)
    for name, content in contents.items():
        (folder / "model" / name).write_bytes(content)
    return Upload(
        folder=folder, device=DEVICE, ancestor="tiny", model_type="gpt2", lineage="gpt2-h8", parameters=1,
        active_parameters=1, tokens=1, embedding="00", bytes=13,
    ).sealed()  # fmt: skip


def _step(box: Inbox, draws: Draws, content: bytes, stream: bytes) -> None:
    """One thing that happens."""
    action = draws.below(6)
    if action == 0:
        box.announce(DEVICE, ORDER, content, world().sign(content))
    elif action == 1:
        first = draws.below(len(stream) + 3) - 1
        piece = bytearray(stream[max(0, first) : first + draws.below(len(stream) + 2)])
        if piece and not draws.below(4):
            piece[draws.below(len(piece))] ^= 1
        box.add(DEVICE, digest(content) if draws.below(8) else draws.text(), first, bytes(piece))
    elif action == 2 and (wanted := box.wanted(DEVICE)) is not None:
        box.add(DEVICE, digest(content), wanted.offset, stream[wanted.offset :][: 1 + draws.below(8)])
    elif action == 3:
        box.settle(DEVICE)
    elif action == 4:
        box.verdict(DEVICE)
    else:  # a file that was under way is shorter again: the machine lost power
        for path in sorted((box.root / "incoming").rglob("[!.]*")):
            if path.is_file() and not draws.below(2):
                os.truncate(path, min(path.stat().st_size, draws.below(8)))


def _in_the_end(box: Inbox, content: bytes, stream: bytes) -> Verdict:
    """What becomes of an upload whose device answers as it is asked."""
    for _ in range(3):
        box.announce(DEVICE, ORDER, content, world().sign(content))
        if (wanted := box.wanted(DEVICE)) is not None:
            box.add(DEVICE, wanted.digest, wanted.offset, stream[wanted.offset :])
            box.settle(DEVICE)
        if (verdict := box.verdict(DEVICE)) is not None:
            return verdict
    raise AssertionError("a device answers as it is asked, and is asked again and again")


# ── whole uploads ─────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = (
    "model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "adapter_config.json", "adapter_model.safetensors", "weights.safetensors.zst", "x.safetensors",
)  # fmt: skip


@cache
def door(name: str) -> Door:
    """One for all uploads of a kind: what follows from their ancestors is most of the work of an input."""
    return Door(len(EMBEDDING), world().ancestors, KINDS[name].lora, KINDS[name].codec)


def upload(data: bytes) -> None:
    """A faultless upload of any kind with up to three harms, through the inbox and the door."""
    draws, made = Draws(data), world()
    name = draws.one(list(KINDS))
    kind, sent, record = KINDS[name], dict(made.files[name]), json.dumps(made.records[name]).encode()
    for _ in range(1 + draws.below(3)):
        if not draws.more:
            break
        record = harm_upload(sent, record, draws)
    with scratch() as root:

        def check(one: Upload) -> None:
            door(name).look(one, root / "inbox" / "unpacked")

        box = Inbox(root / "inbox", made.root / "keys", check, {DEVICE: MOST})
        verdict = None
        with within_bounds(), refusals():
            content = _manifest(record, sent)
            box.announce(DEVICE, ORDER, content, made.sign(content))
            if (wanted := box.wanted(DEVICE)) is not None:
                box.add(DEVICE, wanted.digest, 0, b"".join(sent[name] for name in sorted(sent)))
                verdict = box.settle(DEVICE)
        state = files(root)
        if verdict is None:
            assert not state, f"refused before its bytes came, and left {state}"
            assert data, "a faultless upload is refused"
        elif verdict.state == "rejected":
            in_a_line(verdict.reason)
            assert str(root) not in verdict.reason
            assert state == {f"inbox/verdicts/{DEVICE}.json"}, f"a refused upload left {state}"
            assert data, f"a faultless upload is refused: {verdict.reason}"
        else:
            own = {".manifest.json", ".signature", "record.json"} | set(sent)
            assert state == {f"inbox/verdicts/{DEVICE}.json"} | {f"inbox/uploads/{DEVICE}/{name}" for name in own}
            if sent != made.files[name]:
                _works(box.upload(DEVICE), kind, root / "whole")


def harm_upload(sent: dict[str, bytes], record: bytes, draws: Draws) -> bytes:
    """Do something to the files, in place, or to the record, which comes back."""
    action, names = draws.below(8), sorted(sent)
    if action == 0 or not names:
        return harm_json(record, draws)
    name = draws.one(names)
    content = sent[name]
    folder = name.partition("/")[0]
    if action == 1:
        del sent[name]
    elif action == 2:
        sent[f"{folder}/{draws.one(NAMES)}"] = draws.some()
    elif action == 3:
        sent[f"{folder}/{draws.one(NAMES)}"] = content
    elif action == 4:
        sent[name] = harm_bytes(content, draws)
    elif name.endswith(".json"):
        sent[name] = harm_json(content, draws)
    elif name.endswith(".safetensors"):
        sent[name] = harm_tensors(content, draws)
    elif name.endswith(".zst"):
        sent[name] = _harm_packed(content, draws)
    else:
        sent[name] = harm_bytes(content, draws)
    return record


def _harm_packed(content: bytes, draws: Draws) -> bytes:
    try:
        flat = zstandard.ZstdDecompressor().decompress(content, max_output_size=MOST)
    except zstandard.ZstdError:
        return content
    action = draws.below(8)
    if action < 4:
        return zstandard.compress(harm_tensors(flat, draws))
    if action == 4:
        return zstandard.compress(harm_bytes(flat, draws))
    if action == 5:  # in a few bytes, more than may be unpacked, and never in our own memory at once
        packer = zstandard.ZstdCompressor(level=1).compressobj()
        at, many = draws.below(len(flat) + 1), draws.below(512)
        return b"".join(
            (packer.compress(flat[:at]), *(packer.compress(bytes(2**20)) for _ in range(many)), packer.flush())
        )
    at = draws.below(len(flat))  # as more than one frame, and with what is passed over
    passed_over = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"else"
    return zstandard.compress(flat[:at]) + passed_over * draws.below(9) + zstandard.compress(flat[at:])


def _manifest(record: bytes, sent: Mapping[str, bytes]) -> bytes:
    """What a device would sign, with the record as it is written."""
    entries = [
        {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(sent.items())
    ]
    fields = json.dumps({"version": 1, "order": ORDER, "files": entries}).encode()
    return fields.removesuffix(b"}") + b',"record":' + record + b"}"


def _works(accepted: Upload, kind: Kind, into: Path) -> None:
    """What was accepted opens, and has the weights that the door has looked at."""
    ancestor = world().ancestors[kind.ancestor]
    if accepted.sends != "model":
        into.mkdir()
        accepted = materialise(accepted, ancestor, kind.lora, codec=kind.codec, into=into)
    model, tokenizer, held = open_model(accepted.model), open_tokenizer(accepted.model), stored(accepted.model)
    assert tokenizer.eos_token == open_tokenizer(ancestor.folder).eos_token
    for name, weight in model.state_dict().items():
        one = held.get(name) or held.get(name.removeprefix(f"{model.base_model_prefix}."))
        assert one is None or torch.equal(weight, one.read().float()), name


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────────

GIVEN = messages.Order(
    run="r", device=DEVICE, seed=1, ancestor="gpt2", lineage="gpt2-h8", made=None, made_seed=1, phase=DevicePhase(),
    piece_bytes=2**20, texts={"public.jsonl": hashlib.sha256(b"text").hexdigest()},
)  # fmt: skip
READERS: dict[str, tuple[RecordDict, Callable[[Any], object]]] = {
    "reply": (
        messages.reply(messages.Announcement(b"m", b"s"), messages.Piece("of", 3, b"piece")),
        messages.Reply.read,
    ),
    "failed": (messages.reply(None, None, "it broke"), messages.Reply.read),
    "order": (messages.order(GIVEN, messages.pack({"public.jsonl": b"text"})), messages.read_order),
    "ask": (messages.ask("of", 3, 5), messages.read_ask),
    "verdict": (messages.verdict("accepted", ""), messages.read_verdict),
}


def message(data: bytes) -> None:
    """Every message between server and device, with up to four records or fields of it other than they should be."""
    draws = Draws(data)
    faultless, read = READERS[draws.one(list(READERS))]
    content = RecordDict({name: type(record)(dict(record)) for name, record in faultless.items()})  # pyright: ignore
    for _ in range(draws.below(5)):
        _harm_message(content, draws)
    with within_bounds(), refusals():
        found = read(SimpleNamespace(content=content))
        if isinstance(found, messages.Reply):
            assert found.piece is None or found.piece.offset >= 0
            in_a_line(found.failed)


def _harm_message(content: RecordDict, draws: Draws) -> None:
    names = [*sorted(content), "order", "texts", "reply", "piece", "ask", "verdict"]
    name, action = draws.one(names), draws.below(4)
    record = content.get(name)
    if action == 0:
        content.pop(name, None)
    elif action == 1:
        content[name] = draws.one((ConfigRecord({}), ArrayRecord({}), MetricRecord({"offset": 1})))
    elif isinstance(record, ConfigRecord):
        field = draws.one(
            [*sorted(record), "failed", "manifest", "signature", "of", "offset", "length", "state", "order"]
        )
        if action == 2:
            record.pop(field, None)
        elif field == "order" and isinstance(record.get(field), str) and draws.below(4):
            record[field] = harm_json(str(record[field]).encode(), draws).decode(errors="replace")
        else:
            record[field] = _value(draws)
    elif isinstance(record, ArrayRecord):
        held = draws.some()
        if draws.below(2):
            held = zstandard.compress(draws.one((b"text", b"t" * 2**20, b"", draws.some())))
        shape = draws.one(((len(held),), (), (2**62, 2**62), (-1,)))
        key = draws.one([*record, "piece", "public.jsonl", draws.text()])
        record[key] = Array(dtype=draws.one(("uint8", "object", "")), shape=shape, stype=draws.text(), data=held)


def _value(draws: Draws) -> Any:
    return draws.one((
        "", "x", draws.text(), "\x1b[2J", "y" * 5000, b"", draws.some(), 0, -1, 1, 2**62, -(2**62), 1.5, float("nan"),
        True, [], [1, 2], ["a"], [b"a"], [0.5] * 1000,
    ))  # fmt: skip


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "pieces": pieces,
    "upload": upload,
    "message": message,
}
