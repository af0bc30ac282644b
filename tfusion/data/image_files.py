"""`ImageFiles`: captioned pictures out of a user's own files, brought to one size once and mapped from disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tfusion.data.corpora import CaptionedImage, Split, check_split
from tfusion.data.file_corpus import FileCorpus
from tfusion.data.files import find_files, stamps
from tfusion.data.picture_formats import list_units
from tfusion.data.picture_records import COLUMNS, read_pictures
from tfusion.data.records import BadRecord, Table, build_table, split_rows
from tfusion.pictures import Resize


class ImageFiles(FileCorpus):
    """Captioned pictures in folders, WebDataset shards or parquet; the format is told from the files.

    - a folder with `metadata.jsonl` or `metadata.csv`: `{"file_name": "a.jpg", "text": "a cat"}` a line; `text` may be
      a list, and several lines of one picture are several captions of it;
    - a folder of `name.jpg` with `name.txt`, a caption a line;
    - `.tar` shards (WebDataset): `key.jpg` with `key.txt` (a caption a line) or `key.json`;
    - `.parquet`: a column of picture bytes and one of captions (a string or a list).

    A picture with several captions is trained with one of them each epoch. Pictures are read, checked, converted to RGB
    and brought to `image_size` once, into the cache folder (3 x image_size^2 bytes each), and mapped from there by all
    processes. What cannot be used is left out and reported.

    Args:
        path: a folder, a file, a glob, or a list of these; relative to where the command is run.
        image_size: side in pixels of the training pictures.
        resize: `crop` to the centre square, or `squash` all of the picture into it, out of proportion.
        flip: mirror half of the training pictures, chosen anew each epoch (captions that say left or right then lie).
        val: where the validation pictures are; None = hold out `val_share` of `path`, by a hash of the key.
        val_share: share of the pictures held out where `val` is not given.
        name: in metrics; None = the last part of the path.
        caption_column: of metadata, parquet, or the shards' JSON; None = captions, caption or text.
        image_column: of metadata or parquet; None = file_name, image, filename, file or path.
        where: keep only rows whose columns have these values, such as `{label: true}`.
    """

    def __init__(
        self,
        path: str | list[str],
        image_size: int,
        resize: Resize = "crop",
        flip: bool = False,
        val: str | list[str] | None = None,
        val_share: float = 0.05,
        name: str | None = None,
        caption_column: str | None = None,
        image_column: str | None = None,
        where: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(path, val, val_share, name)
        self.image_size, self.flip = image_size, flip
        if resize not in get_args(Resize):
            raise ValueError(f"corpus {self.name!r}: got resize {resize!r}, expected one of {get_args(Resize)}")
        if image_size < 1:
            raise ValueError(f"corpus {self.name!r}: got image_size {image_size}, expected at least 1 pixel")
        self._options: dict[str, Any] = {
            "corpus": self.name,
            "image_size": image_size,
            "resize": resize,
            "caption_column": caption_column,
            "image_column": image_column,
            "where": where,
        }

    def load(self, split: Split) -> Sequence[CaptionedImage]:
        """The split's pictures; raises ValueError where there are no files or their format cannot be told."""
        check_split(split)
        table = self._table(self.val if self.val is not None and split == "val" else self.path)
        rows = table.rows
        if self.val is None:
            held_out = split_rows(table.keys(), self.val_share)
            rows = rows[held_out if split == "val" else ~held_out]
        return StoredPictures(table, rows[:0] if split == "test" else rows, self.image_size, self.flip)

    def _read(self, path: str | list[str]) -> Table:
        root, files = find_files(path, self.name)
        units = list_units(root, files, self._options)
        # pictures that metadata, named outright, says the places of
        elsewhere = {unit[2] for unit in units if unit[0] == "file"}.difference(map(str, files))
        known = stamps([*files, *map(Path, sorted(elsewhere))], root)
        return Table(build_table(read_pictures, units, self._options, COLUMNS, root, known), self.name)


class StoredPictures(Sequence[CaptionedImage]):
    """Some rows of a table of pictures.

    Args:
        table: the records.
        rows: (N,) of the table.
        image_size: side in pixels.
        flip: whether they may be mirrored.
    """

    def __init__(self, table: Table, rows: np.ndarray, image_size: int, flip: bool) -> None:
        self.table, self.rows, self.image_size, self.flip = table, rows, image_size, flip
        self._captions: dict[int, tuple[str, ...]] = {}  # those that are used of a row that has others too, by row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CaptionedImage:
        row = int(self.rows[index])
        pixels = np.frombuffer(self.table.column("pixels")[row].as_buffer(), np.uint8)
        # a copy: what is mapped from disk is read-only, tensors cannot be
        image = torch.from_numpy(pixels.reshape(3, self.image_size, self.image_size).copy())
        return CaptionedImage(self.table.column("key")[row].as_py(), image, self.captions(index), self.flip)

    def captions(self, index: int) -> tuple[str, ...]:
        """Of one picture, without reading it."""
        row = int(self.rows[index])
        return self._captions.get(row) or tuple(self.table.column("captions")[row].as_py())

    @property
    def content(self) -> str:
        """A hash of all pictures and captions."""
        return self.table.content(self.rows)

    def drop_long_captions(
        self, most: int, count_tokens: Callable[[list[str]], list[int]]
    ) -> tuple[Self, list[BadRecord]]:
        """Without captions of more than `most` tokens, and without the pictures that then have none.

        A token is a byte at least, so only captions of more bytes than `most` are counted.
        """
        lists = self.table.column("captions").take(pa.array(self.rows))
        parents = pc.list_parent_indices(lists).to_numpy()
        suspects = np.unique(parents[pc.binary_length(pc.list_flatten(lists)).to_numpy() > most])
        kept, none_left, bad = dict(self._captions), [], []
        for index in suspects:
            captions = self.captions(int(index))
            lengths = count_tokens(list(captions))
            short = tuple(c for c, length in zip(captions, lengths, strict=True) if length <= most)
            row = int(self.rows[index])
            kept[row] = short
            if not short:
                none_left.append(index)
                key, file = (self.table.column(name)[row].as_py() for name in ("key", "file"))
                detail = f"{min(lengths)} tokens, a row has room for {most}"
                bad.append(BadRecord(self.table.corpus, "caption longer than a row", file, key, detail))
        rest = copy.copy(self)
        rest.rows, rest._captions = np.delete(self.rows, none_left), kept
        return rest, bad
