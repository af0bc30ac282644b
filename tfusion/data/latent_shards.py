"""The files of a latent cache: how they are divided, what stands in them, how they are written and found again.

A cache is a folder of `{train,val,test}-NNNNN-of-MMMMM.parquet`, each a fixed range of a split's pictures in their
order, a row a picture:

- `key`, `captions`: as in the corpus;
- `latents`: what the image tokenizer made of the picture, (C, h, w) in C order, little-endian: float32, bfloat16 or
  float16, or uint16 of ids (1, h, w);
- `mirrored`: the same of the mirrored picture, where training may mirror it, else empty;
- `picture`: the picture itself as PNG, where it was kept, else empty;
- `cause`: why the picture is not used (its latents are not finite), else empty.

`CacheInfo`, in the parquet metadata of every shard under `tfusion`, says what made them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tfusion.data.corpora import Split

VERSION = 1  # raised when a file of today could no longer be read
KEY = b"tfusion"
NAME = re.compile(r"(train|val|test)-\d{5,}-of-\d{5,}\.parquet")
DTYPES = {  # stored -> torch's
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint16": torch.uint16,
}
MOST_IDS = 2**16  # of uint16
Kept = Literal["all", "held_out", "none"]
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("latents", pa.binary()),
        ("mirrored", pa.binary()),
        ("picture", pa.binary()),
        ("cause", pa.string()),
    ]
)


@dataclass(frozen=True)
class Shard:
    """Pictures `start` ... `stop` - 1 of a split: number `number` of `count` shards."""

    split: Split
    number: int
    count: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.split}-{self.number:05d}-of-{self.count:05d}.parquet"


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds and what made it: the same in all of its shards.

    Attributes:
        fingerprint: of the image tokenizer.
        dtype: of the numbers stored, a key of `DTYPES`.
        latent_shape: (C, h, w).
        codebook_size: how many ids there are; None = latents, not ids.
        corpus: name of the corpus encoded.
        image_size: side of its pictures in pixels.
        factor: pixels a latent position, each side.
        num_pictures: of each split.
        content: a hash of each split, where the corpus has one.
        mirrored: whether training may mirror pictures.
        pictures: the splits whose pictures were kept: all, held_out (val and test) or none.
        shard_size: pictures a shard.
        attribution: what the corpus asks to be written where its pictures appear.
        scenes: the pictures are scenes of `tfusion.data.Shapes`, which can be read from pixels.
        made_by: where the image tokenizer lay, for messages: two caches may differ in it.
        version: of the files.
    """

    fingerprint: str
    dtype: str
    latent_shape: tuple[int, int, int]
    codebook_size: int | None
    corpus: str
    image_size: int
    factor: int
    num_pictures: dict[str, int]
    content: dict[str, str]
    mirrored: bool
    pictures: Kept
    shard_size: int
    attribution: str = ""
    scenes: bool = False
    made_by: str = field(default="", compare=False)
    version: int = VERSION

    def shards(self) -> list[Shard]:
        """All of them, split by split."""
        shards = []
        for split in get_args(Split):
            total, size = self.num_pictures[split], self.shard_size
            starts = range(0, total, size)
            shards += [Shard(split, n, len(starts), at, min(at + size, total)) for n, at in enumerate(starts)]
        return shards

    def keeps(self, split: str) -> bool:
        """Whether the pictures of a split stand beside their latents."""
        return self.pictures == "all" or (self.pictures == "held_out" and split != "train")

    def differences(self, other: CacheInfo) -> list[str]:
        """`name is 1, not 2`, of each thing that is not the same in another one."""
        names = [one.name for one in dataclasses.fields(self) if one.compare]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} is {here!r}, not {there!r}" for name, here, there in pairs if here != there]

    def to_bytes(self) -> bytes:
        """JSON."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Self:
        """The inverse; `source` is named where another version of tfusion wrote it."""
        values = json.loads(data)
        if values.get("version") != VERSION:
            raise ValueError(
                f"{source} is a latent cache of version {values.get('version')}, this tfusion reads {VERSION}: encode "
                "the corpus again"
            )
        return cls(**values | {"latent_shape": tuple(values["latent_shape"])})

    def pack(self, latents: Tensor) -> list[bytes]:
        """(n, C, h, w) as the bytes that are stored of each."""
        stored = latents.to("cpu", DTYPES[self.dtype]).flatten(1).contiguous()
        return [one.view(torch.uint8).numpy().tobytes() for one in stored]

    def unpack(self, data: Any) -> Tensor:
        """The inverse of one: (C, h, w) float32, a copy (what is mapped from disk is read-only, tensors cannot be)."""
        return torch.frombuffer(bytearray(data), dtype=DTYPES[self.dtype]).float().reshape(self.latent_shape)


def write_shard(folder: Path, shard: Shard, info: CacheInfo, rows: list[dict[str, Any]]) -> None:
    """Write a whole shard, or, if killed, none of it."""
    assert len(rows) == shard.stop - shard.start, "a row a picture"
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({KEY: info.to_bytes()}))
    # of a name of its own: a killed run may have left a process that still writes the same shard
    temporary = folder / f".{shard.name}.{uuid.uuid4().hex[:8]}.tmp"
    pq.write_table(table, temporary, compression="zstd", use_dictionary=False)
    os.replace(temporary, folder / shard.name)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed process has left of its shard."""
    for path in folder.glob(".*.parquet*.tmp"):
        path.unlink(missing_ok=True)


def found_shards(folder: Path) -> dict[str, Path]:
    """Files that are called as shards are, by name, in order."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: path for path in paths if NAME.fullmatch(path.name)}


def read_info(path: Path) -> CacheInfo:
    """What a shard says of its cache; raises ValueError where it is none."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it, and encode the corpus again") from error
    if KEY not in metadata:
        raise ValueError(f"{path} is parquet, but no part of a latent cache: give the folder that `predict` wrote")
    return CacheInfo.from_bytes(metadata[KEY], str(path))


def bad_rows(folder: Path, info: CacheInfo) -> Iterator[tuple[str, str, str]]:
    """(file, key, cause) of the pictures that are not used."""
    for shard in info.shards():
        table = pq.read_table(folder / shard.name, columns=["key", "cause"])
        yield from ((shard.name, row["key"], row["cause"]) for row in table.to_pylist() if row["cause"])
