"""Uploads in fewer bytes: there and back, what they weigh, and what is refused at the door."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zstandard
from torch import Tensor

from cases import CASES
from deepfusion import adapters, codecs, memory
from deepfusion.artifacts import Checkpoint, Intake, Upload
from deepfusion.checkpoints import as_checkpoint, open_config, open_model, open_tokenizer, save_model, trained_shapes
from deepfusion.codecs import FILE, Contents, Form
from deepfusion.config import Codec, LoRA
from deepfusion.phases.upload import materialise, receive, upload_bytes
from deepfusion.weights import Part, stored, stored_in, tensors, write
from pico import DENSE, adapted, pico, pico_checkpoint
from tiny import folder

LORA = LoRA(rank=2, alpha=4.0)
EMBEDDING = bytes([1, 2, 3, 4, 5, 6, 7, 8])
CODECS = [Codec(numbers=numbers, delta=delta) for numbers in ("float32", "bfloat16", "int8", "nf4") for delta in (0, 1)]


def moved(ancestor: Path, into: Path, by: float = 0.01, rank: int | None = None) -> Path:
    """A descendant, each of whose weights is another: of matrices, by a matrix of some rank."""
    model = open_model(ancestor)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=generator)
            if rank and parameter.ndim == 2:
                left, right = (torch.randn(size, rank, generator=generator) for size in parameter.shape)
                step = left @ right.T
            parameter.add_(by * step)
    save_model(model, open_tokenizer(ancestor), into)
    return into


def weights(place: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in open_model(place).state_dict().items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((one[name] - other[name]).norm()) ** 2 for name in trained(one)))


def trained(held: dict[str, Tensor]) -> list[str]:
    """Without a tied head, which would count twice."""
    return [name for name in held if not name.startswith(("lm_head", "embed_out"))]


# ── one tensor ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_layout_by_hand() -> None:
    """100 numbers a row are two runs, in four bits 50 bytes; a narrow matrix is turned, a vector stays as it is."""
    wide, narrow = Form.of("w", (3, 100), Codec(numbers="nf4")), Form.of("n", (200, 8), Codec(numbers="int8"))
    assert wide.layout() == {"w:q": (torch.uint8, (3, 50)), "w:s": (torch.bfloat16, (3, 2))}
    assert narrow.layout() == {"n:q": (torch.int8, (8, 200)), "n:s": (torch.bfloat16, (8, 4))}
    assert Form.of("v", (7,), Codec(numbers="nf4")).layout() == {"v": (torch.float32, (7,))}
    assert Form.of("x", (), Codec()).layout() == {"x": (torch.float32, ())}
    assert Form.of("w", (3, 4), Codec(numbers="bfloat16")).layout() == {"w": (torch.bfloat16, (3, 4))}


def test_factors_where_they_are_smaller() -> None:
    """2 · (100 + 70) numbers in place of 7,000, but not in place of 12."""
    codec = Codec(numbers="float32", delta=True, rank=2)
    assert Form.of("w", (100, 70), codec).layout() == {
        "w:a": (torch.float32, (2, 70)), "w:b": (torch.float32, (2, 100))
    }  # fmt: skip
    assert list(Form.of("w", (3, 4), codec).layout()) == ["w"]


@pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 0), (0, 3), (3, 70), (200, 8), (2, 3, 65)])
@pytest.mark.parametrize("codec", [*CODECS, Codec(numbers="float32", delta=True, rank=70)], ids=lambda c: c.label)
def test_every_shape_comes_back(shape: tuple[int, ...], codec: Codec, tmp_path: Path) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    form = Form.of("t", shape, codec)
    write(tmp_path, form.parts(lambda rows: values if rows is None else values[rows]))
    held = stored(tmp_path)
    assert {name: (one.dtype, one.shape) for name, one in held.items()} == form.layout()
    form.check(held)
    [part] = Contents((form,), {}).parts(held, None)
    found = torch.cat(list(part.blocks())) if shape else next(part.blocks())
    bound = {"float32": 1e-6, "bfloat16": 2**-8, "int8": 1 / 254, "nf4": 0.16}[codec.numbers]
    assert bool(((found - values).abs() <= bound * (1e-6 + values.abs().max() if values.numel() else 1)).all())


def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ancestor, made = pico("llama", tmp_path / "ancestor"), tmp_path / "made"
    moved(ancestor, made)
    codec = Codec(numbers="int8", delta=True)
    codecs.pack(made, ancestor, codec, into=tmp_path / "whole")
    monkeypatch.setattr("deepfusion.weights.BLOCK", 100)
    codecs.pack(made, ancestor, codec, into=tmp_path / "cut")
    assert (tmp_path / "whole" / FILE).read_bytes() == (tmp_path / "cut" / FILE).read_bytes()


# ── one upload ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.label)
def test_a_model_there_and_back(codec: Codec, tmp_path: Path) -> None:
    """What is measured where it is packed is what the server misses."""
    ancestor = pico("llama", tmp_path / "ancestor")
    made = moved(ancestor, tmp_path / "made")
    packing = codecs.pack(made, ancestor, codec, into=tmp_path / "packed")
    assert [path.name for path in (tmp_path / "packed").iterdir()] == [FILE]
    contents = Contents.of(ancestor, codec, None)
    change = codecs.check(tmp_path / "packed", contents, ancestor, None, scratch=tmp_path / "scratch")
    codecs.unpack(tmp_path / "packed", ancestor, codec, into=tmp_path / "whole", scratch=tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    was, now, first = (weights(tmp_path / name) for name in ("made", "whole", "ancestor"))
    missed, nothing = distance(now, was), {name: torch.zeros_like(tensor) for name, tensor in was.items()}
    assert packing.error == pytest.approx(missed / distance(was, nothing), rel=1e-3, abs=1e-9)
    assert packing.lost == pytest.approx(missed / distance(was, first), rel=1e-3, abs=1e-7)
    limits = {"float32": 1e-6, "bfloat16": 3e-3, "int8": 0.01, "nf4": 0.12}
    assert change == pytest.approx(distance(now, first), rel=1e-4)
    assert (packing.lost if codec.delta else packing.error) < limits[codec.numbers]
    if codec == Codec(numbers="float32"):
        assert all(torch.equal(now[name], tensor) for name, tensor in was.items())
        assert (packing.error, packing.lost) == (0.0, 0.0)
    assert open_config(tmp_path / "whole").dtype == torch.float32
    assert open_tokenizer(tmp_path / "whole").get_vocab() == open_tokenizer(ancestor).get_vocab()


@pytest.mark.contracts
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.model_type in DENSE])
def test_every_kind_of_model(case: str, tmp_path: Path) -> None:
    ancestor = CASES[case].write(tmp_path / "ancestor")
    made = moved(ancestor, tmp_path / "made")
    codec = Codec(numbers="float32", delta=True)
    codecs.pack(made, ancestor, codec, into=tmp_path / "packed")
    codecs.unpack(tmp_path / "packed", ancestor, codec, into=tmp_path / "whole", scratch=tmp_path / "scratch")
    assert trained_shapes(ancestor) == {name: one.shape for name, one in stored(made).items()}
    was, now = weights(made), weights(tmp_path / "whole")
    for name, tensor in was.items():
        torch.testing.assert_close(now[name], tensor, rtol=1e-5, atol=1e-6)


def test_nothing_learned_is_almost_nothing(tmp_path: Path) -> None:
    ancestor = pico("llama", tmp_path / "ancestor", hidden=64, ffn=128)
    size = (ancestor / "model.safetensors").stat().st_size
    for rank in (None, 2):
        codec = Codec(numbers="int8", delta=True, rank=rank)
        packing = codecs.pack(ancestor, ancestor, codec, into=tmp_path / "packed")
        assert (packing.error, packing.lost) == (0.0, 0.0)
        assert (tmp_path / "packed" / FILE).stat().st_size < size / 200


def test_a_change_of_that_rank_is_exact(tmp_path: Path) -> None:
    ancestor = pico("gpt2", tmp_path / "ancestor", hidden=64, ffn=128)
    made = moved(ancestor, tmp_path / "made", rank=3)
    lost = {
        rank: codecs.pack(
            made, ancestor, Codec(numbers="float32", delta=True, rank=rank), into=tmp_path / f"packed-{rank}"
        ).lost
        for rank in (2, 3)
    }  # fmt: skip
    assert lost[3] < 1e-4 < 0.1 < lost[2]
    sizes = [(tmp_path / f"packed-{rank}" / FILE).stat().st_size for rank in (2, 3)]
    assert sizes[0] < sizes[1] < (made / "model.safetensors").stat().st_size / 5


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "int8", "nf4"])
def test_an_adapter_there_and_back(numbers: str, tmp_path: Path) -> None:
    ancestor = pico("gpt2", tmp_path / "ancestor")
    adapters.save(adapted(ancestor, LORA), ancestor, LORA, tmp_path / "adapter")
    codec = Codec(numbers=numbers)  # pyright: ignore[reportArgumentType]
    packing = codecs.pack(tmp_path / "adapter", ancestor, codec, LORA, into=tmp_path / "packed")
    contents = Contents.of(ancestor, codec, LORA)
    codecs.check(tmp_path / "packed", contents, ancestor, LORA, scratch=tmp_path / "scratch")
    codecs.unpack(tmp_path / "packed", ancestor, codec, LORA, into=tmp_path / "whole", scratch=tmp_path / "scratch")
    adapters.merge(ancestor, tmp_path / "adapter", LORA, into=tmp_path / "exact")
    was, now, first = (weights(tmp_path / name) for name in ("exact", "whole", "ancestor"))
    assert packing.lost == pytest.approx(distance(now, was) / distance(was, first), rel=1e-3, abs=1e-6)
    assert packing.lost < {"float32": 1e-6, "bfloat16": 5e-3, "int8": 0.02, "nf4": 0.2}[numbers]


def test_an_ancestor_in_bfloat16_without_its_prefix(tmp_path: Path) -> None:
    """What the server makes has the names that training gives it, whatever the ancestor's are."""
    ancestor = pico("gpt2", tmp_path / "ancestor")
    bare = Path(shutil.copytree(ancestor, tmp_path / "bare"))
    held = {name.removeprefix("transformer."): tensor.bfloat16() for name, tensor in tensors(ancestor)}
    write(bare, [Part.of(name, tensor) for name, tensor in held.items()])
    made = moved(bare, tmp_path / "made")
    codec = Codec(numbers="float32", delta=True)
    codecs.pack(made, bare, codec, into=tmp_path / "packed")
    codecs.unpack(tmp_path / "packed", bare, codec, into=tmp_path / "whole", scratch=tmp_path / "scratch")
    assert {name: one.shape for name, one in stored(made).items()} == {
        name: one.shape for name, one in stored(tmp_path / "whole").items()
    }
    assert distance(weights(made), weights(tmp_path / "whole")) < 1e-5


def test_unpacking_goes_on_from_what_is_whole(tmp_path: Path) -> None:
    ancestor, codec = pico("llama", tmp_path / "ancestor"), Codec()
    codecs.pack(moved(ancestor, tmp_path / "made"), ancestor, codec, into=tmp_path / "packed")
    where = {"into": tmp_path / "whole", "scratch": tmp_path / "scratch"}
    codecs.unpack(tmp_path / "packed", ancestor, codec, **where)
    file = tmp_path / "whole" / "model.safetensors"
    first, written = file.read_bytes(), file.stat().st_mtime_ns
    codecs.unpack(tmp_path / "packed", ancestor, codec, **where, resume=True)
    assert file.stat().st_mtime_ns == written
    file.write_bytes(first[:-1])
    codecs.unpack(tmp_path / "packed", ancestor, codec, **where, resume=True)
    assert file.read_bytes() == first


def test_what_is_not_finite_is_not_packed(tmp_path: Path) -> None:
    ancestor = pico("llama", tmp_path / "ancestor")
    made = moved(ancestor, tmp_path / "made", by=math.inf)
    for codec in (Codec(), Codec(delta=True, rank=1)):
        with pytest.raises(ValueError, match=r"tensor .* holds NaN or infinity: its training diverged"):
            codecs.pack(made, ancestor, codec, into=tmp_path / "packed")


def test_no_model_is_in_memory(tmp_path: Path) -> None:
    ancestor = pico("llama", tmp_path / "ancestor", hidden=512, ffn=4096, layers=3)
    made = moved(ancestor, tmp_path / "made")
    size = (ancestor / "model.safetensors").stat().st_size
    assert size > 80 * 2**20
    codec = Codec(numbers="nf4", delta=True)
    memory.forget()
    before = memory.resident()
    codecs.pack(made, ancestor, codec, into=tmp_path / "packed")
    codecs.check(
        tmp_path / "packed", Contents.of(ancestor, codec, None), ancestor, None, scratch=tmp_path / "scratch"
    )  # fmt: skip
    codecs.unpack(tmp_path / "packed", ancestor, codec, into=tmp_path / "whole", scratch=tmp_path / "scratch")
    assert memory.peak() - before < size / 2


# ── at the door ───────────────────────────────────────────────────────────────────────────────────────────────────────

SENT = Codec(numbers="int8", delta=True)


@pytest.fixture(scope="module")
def ancestor(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return pico_checkpoint("gpt2", tmp_path_factory.mktemp("ancestor"))


@pytest.fixture(scope="module")
def made(ancestor: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moved(ancestor.folder, tmp_path_factory.mktemp("made"))


def sent(device: str, of: Checkpoint, made: Path, into: Path, codec: Codec = SENT) -> Upload:
    packing = codecs.pack(made, of.folder, codec, into=into / "packed")
    return Upload(
        folder=into,
        device=device,
        ancestor="tiny",
        model_type="gpt2",
        lineage=of.lineage,
        parameters=of.parameters,
        active_parameters=of.active_parameters,
        tokens=1,
        embedding=EMBEDDING.hex(),
        bytes=upload_bytes(into / "packed", EMBEDDING),
        sends="packed",
        packing=packing,
    )


def admit(uploads: list[Upload], ancestor: Checkpoint, into: Path) -> Intake:
    where = folder(into / "intake")
    return receive(uploads, {}, embedding_bytes=8, ancestors={"tiny": ancestor}, codec=SENT, into=where)


def refused(harmed: Upload, ancestor: Checkpoint, made: Path, into: Path) -> str:
    """The reason that it is left out, while another is accepted; it declares the bytes that it holds."""
    if (harmed.sent / FILE).is_file() and not (harmed.sent / FILE).is_symlink():
        harmed = harmed.model_copy(update={"bytes": upload_bytes(harmed.sent, EMBEDDING)})
    intake = admit([harmed, sent("b", ancestor, made, into / "b")], ancestor, into)
    assert intake.accepted == ("b",)
    [rejected] = intake.rejected
    assert rejected.reason.startswith("device a: ")
    assert "\n" not in rejected.reason
    assert str(into) not in rejected.reason
    assert not list((into / "intake").glob(".unpacked*"))
    return rejected.reason


def flat(upload: Upload) -> bytes:
    return zstandard.ZstdDecompressor().decompress((upload.sent / FILE).read_bytes())


def put(upload: Upload, content: bytes, tail: bytes = b"") -> None:
    (upload.sent / FILE).write_bytes(zstandard.ZstdCompressor().compress(content) + tail)


def with_header(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Upload], None]:
    def harm(upload: Upload) -> None:
        content = flat(upload)
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        text = json.dumps(header).encode()
        put(upload, len(text).to_bytes(8, "little") + text + content[end:])

    return harm


def with_value(name: str, value: float) -> Callable[[Upload], None]:
    """Overwrite a tensor's first number, in its own dtype."""

    def harm(upload: Upload) -> None:
        file = upload.folder / "flat.safetensors"
        file.write_bytes(flat(upload))
        one = stored_in(file)[name]
        content = bytearray(file.read_bytes())
        number = torch.tensor([value]).to(one.dtype).view(torch.uint8).numpy().tobytes()
        content[one.start : one.start + len(number)] = number
        put(upload, bytes(content))

    return harm


def cut(upload: Upload) -> None:
    whole = (upload.sent / FILE).read_bytes()
    (upload.sent / FILE).write_bytes(whole[: len(whole) // 2])


def link(upload: Upload) -> None:
    (upload.sent / FILE).rename(upload.folder / "elsewhere")
    (upload.sent / FILE).symlink_to(upload.folder / "elsewhere")


W = "transformer.h.0.mlp.c_fc.weight"
HARMS: dict[str, tuple[Callable[[Upload], object], str]] = {
    "a bomb": (lambda a: put(a, flat(a) + bytes(2**28)), f"its packed/{FILE} goes on after its last tensor"),
    "a bomb of nothing": (lambda a: put(a, bytes(2**28)), "has no header of a packed upload"),
    "a long header": (lambda a: put(a, (2**40).to_bytes(8, "little") + bytes(2**28)), "has no header"),
    "a deep header": (lambda a: put(a, (99_999).to_bytes(8, "little") + b"[" * 99_999), "has no header"),
    "another file": (lambda a: (a.sent / "config.json").write_text("{}"), f"must hold the file {FILE}, and nothing"),
    "no file": (lambda a: (a.sent / FILE).unlink(), f"must hold the file {FILE}, and nothing else"),
    "no folder": (lambda a: shutil.rmtree(a.sent), "its packed is missing"),
    "a link": (link, "is a link that leads out of its packed"),
    "too large": (lambda a: (a.sent / FILE).write_bytes(bytes(2**20)), "bytes, and cannot need more than"),
    "no Zstandard": (lambda a: (a.sent / FILE).write_bytes(b"x" * 500), "is not readable"),
    "truncated": (cut, f"its packed/{FILE} ends within its header"),
    "short": (lambda a: put(a, flat(a)[:-9]), "ends before its last tensor"),
    "trailing garbage": (lambda a: put(a, flat(a), b"garbage"), "is not readable"),
    "a second frame": (
        lambda a: put(a, flat(a), zstandard.ZstdCompressor().compress(b"more")),
        "goes on after its last tensor",
    ),
    "another ancestor": (
        with_header(lambda header: header["__metadata__"].update(ancestor="0" * 64)),
        "is packed for ancestor '000000000000000000000000', not '",
    ),
    "another codec": (
        with_header(lambda header: header["__metadata__"].update(codec="nf4 delta")),
        "is packed for codec 'nf4 delta', not 'int8 delta'",
    ),
    "no metadata": (with_header(lambda header: header.pop("__metadata__")), "has no header of a packed upload"),
    "another shape": (
        with_header(lambda header: header[f"{W}:q"].update(shape=[64, 32])),
        f"tensor '{W}:q' is 'I8' '[64, 32]' instead of 'I8' '[32, 64]'",
    ),
    "another dtype": (
        with_header(lambda header: header[f"{W}:q"].update(dtype="U8")),
        f"tensor '{W}:q' is 'U8' '[32, 64]' instead of 'I8' '[32, 64]'",
    ),
    "missing": (with_header(lambda header: header.pop(f"{W}:s")), f"tensor '{W}:s' is not there instead of 'BF16'"),
    "unknown": (
        with_header(lambda header: header.update(x={"dtype": "I8"})),
        "tensor 'x' is 'I8' 'None' instead of not there",
    ),
    "overlapping": (
        with_header(lambda header: header[f"{W}:q"].update(data_offsets=[0, 2048])),
        f"tensor '{W}:q' is 'I8'",
    ),
    "other spaces": (with_header(lambda header: None), "has a header that is written otherwise"),
    "a name that cannot be written": (
        with_header(lambda header: header.update({"\ud800\x1b[2J": {}})),
        r"tensor '\ud800\x1b[2J' is 'None' 'None' instead of not there",
    ),
    "metadata of another kind": (
        with_header(lambda header: header.update(__metadata__=[])),  # pyright: ignore[reportCallIssue]
        "has no header of a packed upload",
    ),
    "NaN": (with_value(f"{W}:s", math.nan), f"tensor {W}:s holds NaN or infinity"),
    "infinity": (with_value("transformer.ln_f.weight", math.inf), "tensor transformer.ln_f.weight holds NaN"),
    "huge": (with_value(f"{W}:s", 1e30), f"tensor {W} may hold more than 65504: its training diverged"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_broken_is_left_out(harm: str, ancestor: Checkpoint, made: Path, tmp_path: Path) -> None:
    upload = sent("a", ancestor, made, tmp_path / "a")
    change, words = HARMS[harm]
    change(upload)
    assert words in refused(upload, ancestor, made, tmp_path)


def test_a_bomb_takes_no_disk(
    ancestor: Checkpoint, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is unpacked is never larger than it must be."""
    upload = sent("a", ancestor, made, tmp_path / "a")
    must = len(flat(upload))
    put(upload, flat(upload) + bytes(2**28))
    contents = Contents.of(ancestor.folder, SENT, None)
    with pytest.raises(ValueError, match="goes on after"):
        contents.inflate(upload.sent, tmp_path / "scratch")
    assert sum(path.stat().st_size for path in (tmp_path / "scratch").iterdir()) == must


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"packing": None}, "it declares no codec, but device.codec is int8 delta"),
        ({"lineage": "gpt2-h32-l2-00000000"}, "its upload is for tiny (gpt2-h32-l2-00000000), from which no device"),
        ({"parameters": 1}, "it declares parameters 1, but tiny has "),
        ({"sends": "model"}, "is missing"),
    ],
)
def test_what_is_said_must_be_true(
    said: dict[str, object], words: str, ancestor: Checkpoint, made: Path, tmp_path: Path
) -> None:
    upload = sent("a", ancestor, made, tmp_path / "a").model_copy(update=said)
    assert words in refused(upload, ancestor, made, tmp_path)


def test_declared_bytes_must_be_true(ancestor: Checkpoint, made: Path, tmp_path: Path) -> None:
    uploads = [sent(device, ancestor, made, tmp_path / device) for device in "ab"]
    uploads[0] = uploads[0].model_copy(update={"bytes": 7})
    [rejected] = admit(uploads, ancestor, tmp_path).rejected
    assert rejected.reason == f"device a: it declares 7 bytes but holds {uploads[1].bytes}"


def test_what_is_sent_is_what_was_asked_for(ancestor: Checkpoint, made: Path, tmp_path: Path) -> None:
    """Another codec, and a packed upload where none is asked for."""
    other = sent("a", ancestor, made, tmp_path / "a", Codec(numbers="nf4"))
    assert "it declares codec nf4, but device.codec is int8 delta" in refused(other, ancestor, made, tmp_path)
    with pytest.raises(ValueError, match=r"it sends its packed alone, which is not what device\.codec asks for"):
        receive([other], {}, embedding_bytes=8, ancestors={"tiny": ancestor}, into=folder(tmp_path / "other"))


def test_an_adapter_that_is_beyond_all_measure(ancestor: Checkpoint, tmp_path: Path) -> None:
    """Its scales pass; their product does not."""
    codec = Codec(numbers="int8")
    model = adapted(ancestor.folder, LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(1e4)
    adapters.save(model, ancestor.folder, LORA, tmp_path / "adapter")
    codecs.pack(tmp_path / "adapter", ancestor.folder, codec, LORA, into=tmp_path / "packed")
    contents = Contents.of(ancestor.folder, codec, LORA)
    with pytest.raises(ValueError, match=r"may add more than 65504 to a weight: its training diverged"):
        codecs.check(tmp_path / "packed", contents, ancestor.folder, LORA, scratch=tmp_path / "scratch")


def test_what_is_accepted_becomes_a_whole_model(ancestor: Checkpoint, made: Path, tmp_path: Path) -> None:
    upload = sent("a", ancestor, made, tmp_path / "a")
    intake = admit([upload], ancestor, tmp_path)
    assert intake.bytes == {"a": (upload.sent / FILE).stat().st_size + 8}
    whole = materialise(upload, ancestor, None, codec=SENT, into=folder(tmp_path / "whole"))
    assert Upload.load(whole.folder) == whole
    assert (whole.packing, whole.bytes, whole.sends) == (upload.packing, upload.bytes, "packed")
    assert distance(weights(whole.model), weights(made)) > 0
    as_checkpoint(whole.model, lineage_of=ancestor.lineage)
    assert {path.name for path in whole.folder.iterdir()} == {"model", "record.json"}
