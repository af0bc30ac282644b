"""What can be told from settings alone: whether they mean something, and whether data and model fit each other.

Nothing here reads a corpus: a command refuses what cannot work before it spends time on what can.
"""

from __future__ import annotations

import math
import os
from typing import Any

from tfusion.data.building import Sizes, row_shape
from tfusion.data.encoded import check_latents, check_not_mixed
from tfusion.sequence import RowShape


def check_settings(data: Any) -> None:
    """Raise ValueError for settings of a `MultimodalDataModule` that mean nothing, whatever the model."""
    for name in ("image_share", "caption_first", "caption_drop", "image_first_noise_limit", "max_bad_share"):
        if not 0 <= getattr(data, name) <= 1:
            raise ValueError(f"data.{name} is {getattr(data, name)}, expected a share between 0 and 1")
    for name in (
        "seq_len",
        "rows_per_step",
        "lanes",
        "val_rows",
        "max_val_images",
        "max_val_characters",
        "predict_batch_size",
    ):
        if getattr(data, name) < 1:
            raise ValueError(f"data.{name} is {getattr(data, name)}, expected a whole number >= 1")
    if data.num_workers < 0:
        raise ValueError(f"data.num_workers is {data.num_workers}, expected a whole number >= 0")
    if not data.image_corpora and not data.text_corpora:
        raise ValueError("no corpus: give data.image_corpora, data.text_corpora or both")
    if data.image_corpora and data.image_share == 0:
        raise ValueError("data.image_share is 0 with image corpora: raise it, or leave out data.image_corpora")
    for kind in ("image", "text"):
        weights, number = getattr(data, f"{kind}_weights"), len(getattr(data, f"{kind}_corpora"))
        if weights is not None and (len(weights) != number or not all(0 < weight < math.inf for weight in weights)):
            raise ValueError(
                f"data.{kind}_weights is {list(weights)} for {number} {kind} corpora: expected one number "
                "above 0 for each"
            )
    if data.prompts is not None and not os.path.isfile(data.prompts):
        raise ValueError(f"data.prompts is {data.prompts!r}, which is no file: give the path of a prompts.jsonl")


def check_together(data: Any) -> None:
    """Raise ValueError for corpora that no run can have together; those of latents are asked what they hold."""
    check_not_mixed(data.image_corpora)
    sizes = {corpus.name: corpus.image_size for corpus in data.image_corpora}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"image corpora of several sizes {sizes}: give all the same image_size")
    names = [corpus.name for corpus in data.image_corpora + data.text_corpora]
    if len(set(names)) < len(names):
        raise ValueError(f"corpora of the same name in {names}: their metrics could not be told apart")
    if shared := set(names) & set(data.choices):
        raise ValueError(f"data.choices has the names {sorted(shared)}, which are corpora's: give others")


def row_for(data: Any, sizes: Sizes) -> RowShape:
    """The rows that these data are packed into for a model; raises ValueError where the two do not fit."""
    encoded = check_latents(data.image_corpora, sizes.image_tokenizer)
    image_size = data.image_corpora[0].image_size if data.image_corpora else None
    return row_shape(data.seq_len, image_size, data.max_images_per_row, sizes, encoded)
