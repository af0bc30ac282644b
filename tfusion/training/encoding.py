"""`CorpusEncoder`: what `tfusion predict --config configs/encode.yaml` runs: a corpus becomes a cache of latents.

The shards (`tfusion/data/latent_shards.py` says what is in them) go into the folder `latents` of the run folder. Each
is a fixed range of pictures and is written whole or not at all; ranks take them in turn. So the number of processes
changes nothing, and the same command again goes on where a killed one stopped.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from PIL import Image as PILImage
from torch import Tensor

from tfusion.data.latent_shards import (
    MOST_IDS,
    CacheInfo,
    Kept,
    Shard,
    bad_rows,
    clear_unfinished,
    found_shards,
    read_info,
    write_shard,
)
from tfusion.data.records import BadRecord
from tfusion.data.shard_batches import PictureBatch
from tfusion.tokenizers import ImageTokenizer, PixelTokenizer

log = logging.getLogger(__name__)
NOT_FINITE = "latents not finite"
Dtype = Literal["bfloat16", "float16", "float32"]


class CorpusEncoder(L.LightningModule):
    """Encode all splits of the one image corpus of the data module, with its captions.

    Training pictures that may be mirrored are encoded mirrored, too. A picture whose latents are not finite (as
    stored: float16 ends at 65,504) is named, left out and counted as a bad record.

    Args:
        image_tokenizer: what encodes.
        dtype: latents are stored in; None = bfloat16. Ids are always stored as whole numbers.
        shard_size: pictures a file, and what a killed process loses at most.
        pictures: splits whose pictures are kept as PNG beside their latents: `held_out` (val and test, which metrics
            compare with and samples ask about), `all` or `none`.
    """

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        dtype: Dtype | None = None,
        shard_size: int = 1024,
        pictures: Kept = "held_out",
    ) -> None:
        super().__init__()
        if isinstance(image_tokenizer, PixelTokenizer):
            raise ValueError("pixels as they are need no cache: give an image_tokenizer that encodes, as VAETokenizer")
        self.codebook_size: int | None = getattr(image_tokenizer, "codebook_size", None)
        if dtype is not None and dtype not in get_args(Dtype):
            raise ValueError(f"got dtype {dtype!r}, expected one of {get_args(Dtype)}")
        if dtype is not None and self.codebook_size is not None:
            raise ValueError(f"got dtype {dtype!r} for ids, which are stored as whole numbers: leave it out")
        if self.codebook_size is not None and self.codebook_size > MOST_IDS:
            raise ValueError(f"got a codebook of {self.codebook_size} ids, 16 bits hold {MOST_IDS}: take a smaller one")
        if pictures not in get_args(Kept):
            raise ValueError(f"got pictures {pictures!r}, expected one of {get_args(Kept)}")
        if shard_size < 1:
            raise ValueError(f"got shard_size {shard_size}, expected at least 1 picture")
        self.image_tokenizer = image_tokenizer  # a plain class: no part of this module
        self.dtype_name = "uint16" if self.codebook_size is not None else dtype or "bfloat16"
        self.shard_size, self.pictures = shard_size, pictures
        self.info: CacheInfo | None = None
        self.todo: list[Shard] = []  # of all ranks
        self._rows: list[dict[str, Any]] = []  # of the shard at hand

    @property
    def folder(self) -> Path:
        """Of the shards."""
        return Path(self.trainer.default_root_dir, "latents")

    def configure_model(self) -> None:
        """The autoencoder's weights onto the device."""
        self.image_tokenizer.to(self.trainer.strategy.root_device)

    def check_data(self, data: Any) -> None:
        """Refuse pictures of a size that cannot be encoded."""
        for corpus in data.image_corpora:
            self.image_tokenizer.latent_shape(corpus.image_size)

    def setup(self, stage: str) -> None:
        """Which shards are to be made; refuses a folder of another cache before anything is encoded."""
        if stage != "predict":
            raise ValueError("CorpusEncoder trains nothing: run `tfusion predict` with it")
        self.info = self._describe()
        self._rows = []
        found = found_shards(self.folder)
        for path in found.values():
            if differences := read_info(path).differences(self.info):
                raise ValueError(
                    f"{path} is of another cache than this run would write: its {'; '.join(differences)}. Give another "
                    "trainer.default_root_dir, set the options back, or remove the folder"
                )
        if self.trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_unfinished(self.folder)
        shards = self.info.shards()
        # rank 0 decides: another rank may look when the first shard of this run is there already
        self.todo = self.trainer.strategy.broadcast([shard for shard in shards if shard.name not in found])
        log.info("%d of %d shards to be written into %s", len(self.todo), len(shards), self.folder)

    def _describe(self) -> CacheInfo:
        data = self.trainer.datamodule
        [corpus] = data.image_corpora
        shape = tuple(self.image_tokenizer.latent_shape(corpus.image_size))
        return CacheInfo(
            fingerprint=self.image_tokenizer.fingerprint,
            dtype=self.dtype_name,
            latent_shape=shape,
            codebook_size=self.codebook_size,
            corpus=corpus.name,
            image_size=corpus.image_size,
            factor=corpus.image_size // shape[-1],
            num_pictures={split: len(pictures) for split, pictures in data.splits.items()},
            content={split: getattr(pictures, "content", "") for split, pictures in data.splits.items()},
            mirrored=bool(data.splits["train"][0].flip),
            pictures=self.pictures,
            shard_size=self.shard_size,
            attribution=getattr(corpus, "attribution", ""),
            scenes=getattr(corpus, "scenes", False),
            made_by=self.image_tokenizer.path,
        )

    def own_shards(self) -> list[Shard]:
        """Those of this rank."""
        return self.todo[self.trainer.global_rank :: self.trainer.world_size]

    def predict_step(self, batch: PictureBatch, batch_idx: int) -> int:
        """Encode a batch, and write its shard with the last of it; returns how many pictures."""
        if batch.shard is None:
            return 0
        images = batch.images.to(self.trainer.strategy.root_device).float() / 127.5 - 1  # (n, 3, S, S), as in training
        mirrored = [flip and batch.shard.split == "train" for flip in batch.flips]
        with torch.autocast(images.device.type, enabled=False):
            latents, bad = self._encode(images)
            others, bad_others = self._encode(images[mirrored].flip(-1))
        of_mirrored = iter(zip(others, bad_others, strict=True))
        keeps = self.info.keeps(batch.shard.split)
        for n, key in enumerate(batch.keys):
            other, bad_other = next(of_mirrored) if mirrored[n] else (b"", False)
            row: dict[str, Any] = {"key": key, "captions": batch.captions[n]}
            if bad[n] or bad_other:
                row |= {"latents": b"", "mirrored": b"", "picture": b"", "cause": NOT_FINITE}
            else:
                png = _png(batch.images[n]) if keeps else b""
                row |= {"latents": latents[n], "mirrored": other, "picture": png, "cause": ""}
            self._rows.append(row)
        if batch.last:
            write_shard(self.folder, batch.shard, self.info, self._rows)
            log.info("%s: %d pictures", batch.shard.name, len(self._rows))
            self._rows = []
        return len(batch.keys)

    def _encode(self, images: Tensor) -> tuple[list[bytes], list[bool]]:
        """Images (n, 3, S, S) as what is stored of each, and whether that is not finite."""
        if len(images) == 0:
            return [], []
        latents = self.image_tokenizer.encode(images)  # (n, C, h, w) float32
        if self.codebook_size is not None:
            assert ((latents >= 0) & (latents < self.codebook_size)).all(), "ids are numbers of the codebook"
            return self.info.pack(latents), [False] * len(images)
        stored = latents.to(getattr(torch, self.dtype_name))
        return self.info.pack(latents), (~stored.isfinite().flatten(1).all(1)).tolist()

    def on_predict_epoch_end(self) -> None:
        """All shards are there: name and count the pictures that are not used."""
        self.trainer.strategy.barrier("latents_written")
        data = self.trainer.datamodule
        [corpus] = data.image_corpora
        left = {shard.name for shard in self.info.shards()} - found_shards(self.folder).keys()
        if left:  # by limit_predict_batches
            log.warning("%d of %d shards are still to be written: run it again", len(left), len(self.info.shards()))
            return
        detail = "the image tokenizer made NaN or infinity of it"
        bad = [
            BadRecord(corpus.name, cause, file, key, detail) for file, key, cause in bad_rows(self.folder, self.info)
        ]
        total = 0 if data.bad_records.totals[corpus.name] else sum(self.info.num_pictures.values())
        data.bad_records.add(bad, corpus.name, total)
        data.bad_records.check()


def _png(image: Tensor) -> bytes:
    """uint8 (3, S, S) as the bytes of a file."""
    file = io.BytesIO()
    PILImage.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
