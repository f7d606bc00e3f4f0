"""The low-rank embedding e_n of a device's text: what its text is about, in at most 64 bytes.

Text → encoder features → mean over texts → a projection that everyone shares → int8. The random projection keeps
cosines (Johnson and Lindenstrauss), so the server compares devices (Eq. 6 of arXiv 2602.14301) without seeing a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from transformers import AutoModel, AutoTokenizer

HASHING = "hashing"
PROJECTION_SEED = 0  # one projection for all devices and servers, or embeddings could not be compared
HASH_FEATURES = 2**14
BATCH = 256  # texts hashed at a time
ENCODER_BATCH = 32  # texts read by a sentence encoder at a time

# Chinese and Japanese put no spaces between words: there a token is one character, and a word pair two.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_TOKEN = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]{{2,}}"


def encode_texts(encoder: str, texts: Sequence[str]) -> Float[ndarray, "texts features"]:
    """Features of each text: float32 rows of length 1 (a text without a single word is a row of zeros).

    Args:
        encoder: `hashing` (counts of words and word pairs, hashed; English stop words left out, because with them every
            text resembles every other) or the folder of a sentence encoder (mean over its tokens' last hidden states).
        texts: At least one.

    Raises:
        ValueError: there is no text, or the folder holds no encoder.
    """
    return np.concatenate(list(_batches(encoder, texts)))


def embed(encoder: str, texts: Sequence[str], size: int, seed: int = PROJECTION_SEED) -> bytes:
    """The embedding e_n of all of a device's texts: `size` int8 numbers.

    Devices and server must agree on `encoder`, `size` and `seed`, so never pass a device's own seed.

    Raises:
        ValueError: there is no text, no text has a word, or the folder holds no encoder.
    """
    # Summed in float64, so that the order of addition does not reach the last int8 bit.
    total = sum(batch.sum(axis=0, dtype=np.float64) for batch in _batches(encoder, texts))
    mean = np.asarray(total) / len(texts)
    if not mean.any():
        raise ValueError(f"none of the {len(texts)} texts has a word that encoder {encoder!r} knows: nothing to embed")
    return quantise(mean @ projection(len(mean), size, seed))


def similarity_to(
    centroids: Sequence[str], texts: Sequence[str], *, encoder: str, seed: int = PROJECTION_SEED
) -> Float[ndarray, "texts clusters"]:
    """Cosine of each text with each cluster's centroid, under the devices' own encoder and projection.

    Args:
        centroids: int8 in hex, as in `Clusters`; the column of an empty cluster ("") is -1, so no text prefers it.
        texts: Any number; a text without a word scores 0 with every centroid that is there.
        encoder: The devices' encoder.
        seed: The devices' projection seed.

    Raises:
        ValueError: a centroid is broken, or the folder holds no encoder.
    """
    units = {column: decode(centroid) for column, centroid in enumerate(centroids) if centroid}
    similarity = np.full((len(texts), len(centroids)), -1.0, dtype=np.float32)
    if not units or not texts:
        return similarity
    targets = np.stack(list(units.values()))
    rows = []
    for batch in _batches(encoder, texts):
        projected = batch @ projection(batch.shape[1], targets.shape[1], seed)
        length = np.linalg.norm(projected, axis=1, keepdims=True)
        rows.append(projected / np.where(length > 0, length, 1) @ targets.T)
    similarity[:, list(units)] = np.concatenate(rows)
    return similarity


@lru_cache(maxsize=4)
def projection(features: int, size: int, seed: int) -> Float[ndarray, "features size"]:
    """The shared Gaussian projection: the same numbers wherever `seed` is the same; entries have variance 1/size."""
    matrix = np.random.default_rng(seed).standard_normal((features, size), dtype=np.float32) / np.float32(size**0.5)
    matrix.flags.writeable = False
    return matrix


def quantise(vector: Float[ndarray, " size"]) -> bytes:
    """A direction as int8: its largest entry becomes ±127.

    Raises:
        ValueError: the vector is zero or not finite, and so has no direction.
    """
    largest = float(np.abs(vector).max(initial=0))
    if not 0 < largest < np.inf:
        raise ValueError("a vector that is zero or not finite has no direction to keep")
    return np.rint(np.asarray(vector) * (127 / largest)).astype(np.int8).tobytes()


def decode(embedding: str) -> Float[ndarray, " size"]:
    """An int8 embedding in hex as a float32 vector of length 1.

    Raises:
        ValueError: it is not hex, empty, or all zero.
    """
    try:
        numbers: Int[ndarray, " size"] = np.frombuffer(bytes.fromhex(embedding), dtype=np.int8)
    except ValueError:
        raise ValueError(f"embedding {embedding[:16]!r} is not hex") from None
    vector = numbers.astype(np.float32)
    if not vector.any():
        raise ValueError("embedding is all zero" if len(vector) else "embedding is empty")
    return vector / np.linalg.norm(vector)


def cosine(a: Float[ndarray, " size"], b: Float[ndarray, " size"]) -> float:
    """cos(a, b) of two vectors that are not zero (Eq. 6)."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def _batches(encoder: str, texts: Sequence[str]) -> Iterator[Float[ndarray, "texts features"]]:
    """Features of the texts, a batch at a time: a device's whole text as dense features need not fit in memory."""
    if not texts:
        raise ValueError("there is no text to embed")
    return _hashed(texts) if encoder == HASHING else _sentence_encoded(Path(encoder), texts)


def _hashed(texts: Sequence[str]) -> Iterator[Float[ndarray, "texts features"]]:
    # A hundred megabytes, which a federation's server, who only reads embeddings, can do without.
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=HASH_FEATURES,
        token_pattern=_TOKEN,
        stop_words="english",
        ngram_range=(1, 2),
        dtype=np.float32,  # pyright: ignore[reportArgumentType] (annotated by its default, float64)
    )
    for start in range(0, len(texts), BATCH):
        rows: Any = vectorizer.transform(texts[start : start + BATCH])
        yield rows.toarray()


def _sentence_encoded(folder: Path, texts: Sequence[str]) -> Iterator[Float[ndarray, "texts features"]]:
    model, tokenizer, longest = _open_encoder(folder)
    for start in range(0, len(texts), ENCODER_BATCH):
        batch = tokenizer(
            list(texts[start : start + ENCODER_BATCH]),
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        yield torch.nn.functional.normalize(mean, dim=-1).numpy()


def _open_encoder(folder: Path) -> tuple[Any, Any, int]:
    """The model, its tokenizer, and the most tokens that it reads of one text."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"encoder {folder} is not a checkpoint folder: it has no config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, loading = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds of error over files that are missing or unknown
        raise ValueError(f"encoder {folder} cannot be opened: {' '.join(str(error).split())}") from error
    # A head that mean pooling never reads may be absent; anything else would be random numbers.
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"encoder {folder} lacks weights, {missing[0]} among them")
    if tokenizer.pad_token is None:
        raise ValueError(f"encoder {folder}: its tokenizer has no padding token, so it is no sentence encoder")
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    settings = folder / "sentence_bert_config.json"
    if settings.is_file():
        longest = min(longest, json.loads(settings.read_text(encoding="utf-8")).get("max_seq_length") or longest)
    return model.eval(), tokenizer, longest
