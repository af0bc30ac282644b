"""`Latents`: a corpus whose pictures an image tokenizer has encoded before, as `tfusion predict` wrote them.

Training reads latents in place of pixels, so the image tokenizer does not run; documents, their order and all choices
are those of the corpus that was encoded.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image as PILImage
from torch import Tensor

from tfusion.data.corpora import CaptionedImage, Split, check_split
from tfusion.data.file_corpus import FileCorpus
from tfusion.data.files import stamps
from tfusion.data.image_files import StoredPictures
from tfusion.data.latent_shards import CacheInfo, found_shards, read_info
from tfusion.data.records import Table, bad, build_table, content_hash

COLUMNS = {
    "split": datasets.Value("string"),
    "captions": datasets.List(datasets.Value("string")),
    "latents": datasets.Value("large_binary"),
    "mirrored": datasets.Value("large_binary"),
    "picture": datasets.Value("large_binary"),
}
EMPTY = {"captions": [], "latents": b"", "mirrored": b"", "picture": b""}


@dataclass(frozen=True)
class EncodedImage:
    """What a `CaptionedImage` is, with latents in place of pixels.

    Attributes:
        key, captions, flip: as in `CaptionedImage`.
        image_size: side of the picture in pixels.
        latents: float32 (C, h, w), or whole numbers (1, h, w).
        mirrored: those of the mirrored picture, where `flip`.
        png: the picture itself, or nothing.
    """

    key: str
    captions: tuple[str, ...]
    flip: bool
    image_size: int
    latents: Tensor
    mirrored: Tensor | None
    png: bytes

    @property
    def image(self) -> Tensor:
        """uint8 (3, H, W), decoded when asked for; raises ValueError where the picture was not kept."""
        if not self.png:
            raise ValueError(
                f"picture {self.key!r} is wanted, but its latents alone were kept: encode the corpus again with "
                "--model.init_args.pictures all"
            )
        pixels: Any = np.array(PILImage.open(io.BytesIO(self.png)))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def data(self, mirrored: bool = False) -> Tensor:
        """What a document holds of it: its latents, or those of the mirrored picture."""
        return self.mirrored if mirrored else self.latents  # type: ignore[return-value]


class Latents(FileCorpus):
    """The latents, or ids, of another corpus, out of what `tfusion predict --config configs/encode.yaml` wrote.

    Splits, keys, captions and their order are those of the corpus encoded. The shards are read once into the cache
    folder and mapped from there by all processes, as pictures of `ImageFiles` are. A run's `image_tokenizer` has to be
    the one that made the latents, and all image corpora of a run are latents, or none is.

    Args:
        path: the folder of the shards; `~` and environment variables are expanded.
        name: in metrics; None = that of the corpus encoded.

    Nothing is read before a run asks what it holds: predictions need no corpus.
    """

    def __init__(self, path: str, name: str | None = None) -> None:
        super().__init__(path, None, 0.0, name)
        self.folder = Path(os.path.abspath(os.path.expandvars(os.path.expanduser(path))))

    @cached_property
    def info(self) -> CacheInfo:
        """What the shards say of themselves; raises ValueError unless they are one whole cache."""
        found = found_shards(self.folder)
        if not found:
            raise ValueError(
                f"{self.path!r} holds no shard of a latent cache (looked in {self.folder}): give the folder `latents` "
                "of the run folder that `tfusion predict --config configs/encode.yaml` wrote"
            )
        info = read_info(next(iter(found.values())))
        name, expected = self._name or info.corpus, {shard.name for shard in info.shards()}
        if missing := sorted(expected - found.keys()):
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"corpus {name!r}: {len(missing)} of {len(expected)} shards are missing in {str(self.folder)!r}: "
                f"{', '.join(missing[:5])}{more}; encode again into the same folder, which goes on where it stopped"
            )
        if others := sorted(found.keys() - expected):
            raise ValueError(
                f"corpus {name!r}: {others[0]} in {str(self.folder)!r} is of another cache than "
                f"{next(iter(found))}: remove one of them"
            )
        return info

    name = property(lambda self: self._name or self.info.corpus)
    image_size = property(lambda self: self.info.image_size)
    latent_shape = property(lambda self: self.info.latent_shape)
    fingerprint = property(lambda self: self.info.fingerprint)
    codebook_size = property(lambda self: self.info.codebook_size)

    @property
    def attribution(self) -> str:
        """Of the corpus encoded; empty where the cache is not there, for predictions show none of its pictures."""
        try:
            return self.info.attribution
        except ValueError:
            return ""

    scenes = property(lambda self: self.info.scenes)

    def load(self, split: Split) -> Sequence[CaptionedImage]:
        """The split's pictures; empty where the corpus encoded has none."""
        check_split(split)
        table = self._table(self.path)
        of_split = table.column("split").to_numpy() == split
        return EncodedPictures(table, table.rows[of_split[table.rows]], self.info, split)  # type: ignore[return-value]

    def _read(self, path: str | list[str]) -> Table:
        files = [self.folder / shard.name for shard in self.info.shards()]
        for file in files[1:]:
            if differences := read_info(file).differences(self.info):
                raise ValueError(
                    f"corpus {self.name!r}: {file.name} is of another cache than {files[0].name}: "
                    f"{'; '.join(differences)}. Remove the folder, and encode the corpus again"
                )
        units = [(str(self.folder / shard.name), shard.name, shard.split) for shard in self.info.shards()]
        known = stamps(files, self.folder)
        return Table(build_table(read_shard, units, {"corpus": self.name}, COLUMNS, self.folder, known), self.name)


class EncodedPictures(StoredPictures):
    """Some rows of a table of latents.

    Args:
        table: the records.
        rows: (N,) of the table.
        info: of the cache.
        split: that all are of.
    """

    def __init__(self, table: Table, rows: np.ndarray, info: CacheInfo, split: Split) -> None:
        super().__init__(table, rows, info.image_size, flip=info.mirrored)
        self.info = info
        self.has_pixels = info.keeps(split)  # see `sources.has_pixels`

    def __getitem__(self, index: int) -> EncodedImage:  # type: ignore[override]
        row = int(self.rows[index])
        key, latents, mirrored, png = (self.table.column(n)[row] for n in ("key", "latents", "mirrored", "picture"))
        mirror = mirrored.as_buffer()
        return EncodedImage(
            key.as_py(),
            self.captions(index),
            flip=mirror.size > 0,
            image_size=self.image_size,
            latents=self.info.unpack(latents.as_buffer()),
            mirrored=self.info.unpack(mirror) if mirror.size else None,
            png=png.as_py(),
        )


def read_shard(unit: tuple[str, str, str], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a shard, rows of `records.COMMON` and `COLUMNS`."""
    path, name, split = unit
    file = pq.ParquetFile(path)
    number = 0
    try:
        for batch in file.iter_batches(256):
            for row in batch.to_pylist():
                number += 1
                yield _record(row, name) | {"split": split}
    except (OSError, pa.ArrowException) as error:  # a broken page: what follows is lost with it
        for lost in range(number, file.metadata.num_rows):
            yield bad(f"{name}:{lost}", name, "broken parquet", str(error)) | EMPTY | {"split": split}


def _record(row: dict[str, Any], name: str) -> dict[str, Any]:
    if row["cause"]:
        return bad(row["key"], name, row["cause"]) | EMPTY
    captions = [caption.encode() for caption in row["captions"]]
    content = content_hash(row["latents"], row["mirrored"], *captions)
    return row | {"file": name, "content": content, "detail": ""}
