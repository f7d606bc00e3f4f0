"""What codecs make of an upload: bytes, what is lost, and how long it takes.

    python benchmarks/codecs.py TRAINED ANCESTOR [--ranks 8 32] [--adapter FOLDER] [--out FOLDER]

TRAINED and ANCESTOR are checkpoint folders, such as a run's `steps/device/*/model` and the model that it started from;
with `--adapter` an adapter of ANCESTOR (`steps/device/*/adapter`) is packed too. Prints a Markdown table. `of bf16`:
bytes as a share of all weights in bfloat16, without config and tokenizer. `error` and `lost`: L2 distance of what is
unpacked from what was trained, relative to its weights, and to what training changed. `pack` includes measuring that.
Speeds are in megabytes of float32 weights, one process, all threads that torch has.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from deepfusion import adapters, codecs
from deepfusion.artifacts import Packing
from deepfusion.checkpoints import parameters
from deepfusion.config import Codec, LoRA


def main() -> None:
    """Parse, pack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("ancestor", type=Path)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--out", type=Path, help="where to work; default: a folder of its own, removed at the end")
    given = parser.parse_args()
    numbers = parameters(given.trained)
    print(f"{numbers:,} weights, {2 * numbers:,} bytes in bfloat16\n")
    print("| codec | bytes | of bf16 | error | lost | pack, MB/s | unpack, MB/s |\n|---|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory(dir=given.out) as work:
        for codec in _codecs(given.ranks):
            _line(codec.label, numbers, *_packed(given.trained, given.ancestor, codec, None, Path(work)))
        if given.adapter is not None:
            lora = _settings(given.adapter)
            size = (given.adapter / adapters.WEIGHTS).stat().st_size
            print(f"| adapter of rank {lora.rank}, as it is | {size:,} | {size / 2 / numbers:.2%} | | | | |")
            for codec in _codecs([]):
                if not codec.delta:
                    packed = _packed(given.adapter, given.ancestor, codec, lora, Path(work))
                    _line(f"adapter, {codec.label}", numbers, *packed)


def _codecs(ranks: list[int]) -> list[Codec]:
    kinds = ("float32", "bfloat16", "int8", "nf4")
    plain = [Codec(numbers=kind, delta=delta) for delta in (False, True) for kind in kinds]
    return plain + [Codec(numbers=kind, delta=True, rank=rank) for rank in ranks for kind in kinds[1:]]


def _packed(
    made: Path, ancestor: Path, codec: Codec, lora: LoRA | None, work: Path
) -> tuple[int, Packing, float, float]:
    """Bytes, what is lost, and seconds there and back."""
    begun = time.perf_counter()
    packing = codecs.pack(made, ancestor, codec, lora, into=work / "packed")
    there = time.perf_counter()
    codecs.unpack(work / "packed", ancestor, codec, lora, into=work / "whole", scratch=work / "scratch")
    back = time.perf_counter()
    size = (work / "packed" / codecs.FILE).stat().st_size
    shutil.rmtree(work / "whole")
    return size, packing, there - begun, back - there


def _line(name: str, numbers: int, size: int, packing: Packing, there: float, back: float) -> None:
    speeds = " | ".join(f"{4e-6 * numbers / seconds:,.0f}" for seconds in (there, back))
    shares = f"{size / 2 / numbers:.2%} | {packing.error:.5f} | {packing.lost:.4f}"
    print(f"| `{name}` | {size:,} | {shares} | {speeds} |", flush=True)


def _settings(adapter: Path) -> LoRA:
    """As much of an adapter's settings as packing needs: both parts of every layer are taken to be adapted."""
    fields = json.loads((adapter / adapters.CONFIG).read_text(encoding="utf-8"))
    return LoRA(rank=fields["r"], alpha=fields["lora_alpha"])


if __name__ == "__main__":
    main()
