"""Rows as training packs them, of made-up text and pictures: what the mask of attention and a step's cost depend on.

Legend: B rows, T positions, K images a row, P patches an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfusion.models.patches import num_patches
from tfusion.sequence import NUM_SPECIAL_IDS, Batch, Document, Image, RowShape, collate

CAPTION_LEN = 32
MARKERS = 4  # BOS, BOI, EOI, EOS


def packed_batch(
    rows: int,
    seq_len: int,
    latent_shape: tuple[int, int, int],
    patch_size: int,
    images_a_row: int | None = None,
    vocab: int = 256,
) -> Batch:
    """B rows of T positions, in each of which captioned images and texts alternate; all positions are used.

    Args:
        rows, seq_len: B, T.
        latent_shape, patch_size: (C, h, w) of an image, and the side of its patches.
        images_a_row: K; None = those that take about half of the positions, as in the paper, at least one.
        vocab: text ids without the special ones.

    Raises:
        ValueError: a row is too short for its images.
    """
    patches = num_patches(latent_shape, patch_size)
    caption_len = max(1, min(CAPTION_LEN, seq_len - patches - MARKERS))  # (one image alone may fill a short row)
    length = patches + caption_len + MARKERS
    most = seq_len // length
    images = min(most, max(1, round(seq_len / length / 2))) if images_a_row is None else images_a_row
    if images > most or most == 0:
        raise ValueError(
            f"{max(1, images)} images of {patches} patches with captions take {max(1, images) * length} positions, "
            f"but a row has {seq_len}: take fewer images or longer rows"
        )
    draws = torch.Generator().manual_seed(0)

    def text(length: int) -> list[int]:
        return (torch.randint(vocab, (length,), generator=draws) + NUM_SPECIAL_IDS).tolist()

    def row() -> list[Document]:
        documents, left = [], seq_len
        for image in range(images):
            documents.append(Document((text(caption_len), Image(torch.randn(latent_shape, generator=draws)))))
            left -= length
            gap = (left - (images - image - 1) * length) // (images - image)
            documents += [Document((text(gap - 2),))] if gap > 2 else []  # (BOS and EOS are of it)
            left -= gap if gap > 2 else 0
        return documents + ([Document((text(left),), eos=False, bos=False)] if left else [])

    shape = RowShape(seq_len, patches, images, latent_shape, None)
    return collate([row() for _ in range(rows)], shape, [("bench", n) for n in range(rows)])


def text_batch(rows: int, seq_len: int, vocab: int = 256) -> Batch:
    """The same rows for a model of text alone: one text each."""
    draws = torch.Generator().manual_seed(0)
    ids = (torch.randint(vocab, (rows, seq_len - 2), generator=draws) + NUM_SPECIAL_IDS).tolist()
    shape = RowShape(seq_len, 0, 0, (0, 0, 0), None)
    return collate([[Document((text,))] for text in ids], shape, [("bench", n) for n in range(rows)])


def as_samples(batch: Batch) -> list[list[Tensor]]:
    """Each row as transfusion-pytorch takes it: texts of ids 0 ... vocab - 1 without special ones, and latents
    (C, h, w), in their order.
    """
    samples, image = [], 0
    for ids, of_image in zip(batch.token_ids, batch.image_ids, strict=True):
        row: list[Tensor] = []
        values, counts = of_image.unique_consecutive(return_counts=True)
        for value, part in zip(values.tolist(), ids.split(counts.tolist()), strict=True):
            if value >= 0:
                row.append(batch.latents[image])
                image += 1
            elif (part >= NUM_SPECIAL_IDS).any():
                row.append(part[part >= NUM_SPECIAL_IDS] - NUM_SPECIAL_IDS)
        samples.append(row)
    return samples
