"""What `predict` encodes into a latent cache: all splits of a corpus, in batches that each belong to one shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tfusion.data.corpora import CaptionedImage, ImageCorpus, Split
from tfusion.data.latent_shards import Shard
from tfusion.data.latents import Latents
from tfusion.data.sources import load_split


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of one shard, in their order.

    Attributes:
        shard: where they go; None = nothing to do.
        images: uint8 (n, 3, S, S).
        keys, captions, flips: of each.
        last: whether the shard is complete with them.
    """

    shard: Shard | None
    images: Tensor
    keys: tuple[str, ...] = ()
    captions: tuple[tuple[str, ...], ...] = ()
    flips: tuple[bool, ...] = ()
    last: bool = False


NOTHING = PictureBatch(None, torch.empty(0, 3, 1, 1, dtype=torch.uint8))


def check_corpora(image_corpora: Sequence[ImageCorpus], text_corpora: Sequence[Any]) -> ImageCorpus:
    """The corpus to encode; raises ValueError unless there is exactly one, of pictures."""
    names = [corpus.name for corpus in [*image_corpora, *text_corpora]]
    if len(image_corpora) != 1 or text_corpora:
        raise ValueError(
            f"got the corpora {names}; latents are encoded a corpus at a time: expected one in data.image_corpora and "
            "none in data.text_corpora"
        )
    [corpus] = image_corpora
    if isinstance(corpus, Latents):
        raise ValueError(f"corpus {corpus.name!r} is a latent cache already: give the corpus of pictures itself")
    return corpus


def load_splits(corpus: ImageCorpus) -> dict[Split, Sequence[CaptionedImage]]:
    """All splits; training may not be empty."""
    return {split: (load_split if split == "train" else _load)(corpus, split) for split in get_args(Split)}


def _load(corpus: ImageCorpus, split: Split) -> Sequence[CaptionedImage]:
    return corpus.load(split)


class ShardBatches(Dataset):
    """Batches of whole shards, one after the other; at least one, if of nothing.

    (Lightning skips a rank without batches, and its part in collectives.)

    Args:
        splits: the pictures.
        shards: of this rank.
        batch_size: pictures a batch, at most.
    """

    def __init__(self, splits: dict[Split, Sequence[CaptionedImage]], shards: Sequence[Shard], batch_size: int) -> None:
        self.splits = splits
        self.parts = [
            (shard, range(start, min(start + batch_size, shard.stop)))
            for shard in shards
            for start in range(shard.start, shard.stop, batch_size)
        ]

    def __len__(self) -> int:
        return max(1, len(self.parts))

    def __getitem__(self, index: int) -> PictureBatch:
        if not self.parts:
            return NOTHING
        shard, some = self.parts[index]
        pictures = [self.splits[shard.split][i] for i in some]
        return PictureBatch(
            shard,
            torch.stack([picture.image for picture in pictures]),
            tuple(picture.key for picture in pictures),
            tuple(picture.captions for picture in pictures),
            tuple(picture.flip for picture in pictures),
            last=some.stop == shard.stop,
        )

    def loader(self, num_workers: int) -> DataLoader:
        """In order, made by so many processes."""
        # lists of one batch, for Lightning warns of a loader without a batch size
        return DataLoader(self, batch_size=1, collate_fn=itemgetter(0), num_workers=num_workers)  # type: ignore[arg-type]
