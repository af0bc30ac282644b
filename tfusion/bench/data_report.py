"""What `check_data` measures, as numbers: corpora, packing, epochs, latents."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from tfusion.data.corpora import ImageCorpus, TextCorpus
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.data.mixture import Stream, StreamPosition
from tfusion.data.records import Table
from tfusion.data.sources import captions_of
from tfusion.models.flops import attention_share, training_flops
from tfusion.sequence import collate
from tfusion.tokenizers import PixelTokenizer
from tfusion.training.multimodal import MultimodalModule
from tfusion.training.transfusion import TransfusionModule

SAMPLED = 2000  # captions, and pieces of text, whose tokens are counted


def check(data: MultimodalDataModule, module: TransfusionModule, rows: int, tokens_per_s: float) -> dict[str, Any]:
    """Everything there is to say about prepared data, as numbers."""
    report: dict[str, Any] = {"corpora": [], "bad_share_allowed": data.bad_records.max_share}
    images = data.mixture.images
    for number, corpus in enumerate(data.image_corpora):
        report["corpora"].append(check_pictures(corpus, images.pictures.parts[number], data))
    for number, corpus in enumerate(data.text_corpora):
        report["corpora"].append(check_texts(corpus, number, data))
    report["packing"] = check_packing(data, rows)
    report["epochs"] = epochs(report, data, tokens_per_s)
    if isinstance(module, MultimodalModule):
        report["compute"] = check_compute(data, module)
    if images and not isinstance(module.image_tokenizer, PixelTokenizer):
        report["latents"] = check_latents(data, module)
    return report


def check_pictures(corpus: ImageCorpus, train: Any, data: MultimodalDataModule) -> dict[str, Any]:
    """Of a corpus of pictures; `train` is what is left of its training split."""
    some = [captions_of(train, i) for i in spread(len(train), SAMPLED)]
    tokens = np.array(list(map(len, data.tokenizer.encode_batch([c for captions in some for c in captions]))))
    result = {
        "name": corpus.name,
        "kind": "image",
        "image_size": corpus.image_size,
        "train": len(train),
        "val": len(corpus.load("val")),
        "captions_a_picture": quantiles(np.array([len(captions) for captions in some])),
        "caption_tokens": quantiles(tokens),
        "document_positions": float(tokens.mean()) + data.mixture.shape.num_patches + 4,
    }
    for table in corpus.tables() if hasattr(corpus, "tables") else []:
        if "width" not in table.dataset.column_names:  # latents
            result.setdefault("files", []).append(records_of(table))
            continue
        good = table.dataset.data.table.select(["width", "height", "notes"]).take(table.rows)
        sides = pc.min_element_wise(good["width"], good["height"]).to_numpy()
        result.setdefault("files", []).append(
            records_of(table)
            | {
                "width": quantiles(good["width"].to_numpy()),
                "height": quantiles(good["height"].to_numpy()),
                "smaller_than_image_size": int((sides < corpus.image_size).sum()),
                "converted": dict(
                    Counter(n for notes in good["notes"].to_pylist() if notes for n in notes.split(", "))
                ),
            }
        )
    return result


def check_texts(corpus: TextCorpus, number: int, data: MultimodalDataModule) -> dict[str, Any]:
    """Of a corpus of texts."""
    pieces = data.mixture.texts
    spans = pieces.pieces[number]
    size = int((spans[:, 2] - spans[:, 1]).sum())
    first = sum(pieces.sizes[:number])
    chosen = spread(len(spans), SAMPLED // 10)
    tokens = sum(len(pieces[first + i].elements[0]) for i in chosen)
    size_chosen = sum(int(spans[i, 2] - spans[i, 1]) for i in chosen)
    result = {
        "name": corpus.name,
        "kind": "text",
        "train": len(pieces.corpora[number]),
        "val": len(corpus.load("val")),
        "bytes": size,
        "pieces": len(spans),
        "bytes_a_token": size_chosen / max(1, tokens),
        "tokens": round(size * tokens / max(1, size_chosen)),
    }
    if hasattr(corpus, "tables"):
        result["files"] = [records_of(table) for table in corpus.tables()]
    return result


def check_packing(data: MultimodalDataModule, rows: int) -> dict[str, Any]:
    """Of the first rows of eight streams: the share of positions that hold something, and of those, images'."""
    shape = data.mixture.shape
    used = of_images = images = count = 0
    for number in spread(data.lanes * data.rows_per_step, 8):
        stream = Stream(data.mixture, number, StreamPosition())
        for _ in range(max(1, rows // 8)):
            for document in stream.next_row():
                length = document.length(shape.num_patches)
                used += length
                of_images += length if document.images else 0
                images += len(document.images)
            count += 1
    return {
        "rows": count,
        "utilisation": used / (count * shape.seq_len),
        "image_share": of_images / used,
        "images_a_row": images / count,
        "image_slots_a_row": shape.max_images,
        "patches_an_image": shape.num_patches,
    }


def check_compute(data: MultimodalDataModule, module: MultimodalModule) -> dict[str, float]:
    """Model FLOPs of a step as `train/flops` counts them, and with attention only where the mask lets it through.

    From the first row of eight streams.
    """
    shape, R = data.mixture.shape, data.rows_per_step
    numbers = spread(data.lanes * R, 8)
    rows = [Stream(data.mixture, number, StreamPosition()).next_row() for number in numbers]
    batch = collate(rows, shape, [("check_data", number) for number in numbers])
    labels = round(float(batch.step_counts[0]) * R / len(rows))
    sizes = (R, shape.seq_len, labels, R * shape.max_images)
    share = attention_share(batch, module.model.seen_together(batch.image_ids))
    return {
        "flops_a_step": training_flops(module.model, *sizes),
        "attention_share": share,
        "flops_a_step_masked": training_flops(module.model, *sizes, attention_share=share),
    }


def epochs(report: dict[str, Any], data: MultimodalDataModule, tokens_per_s: float) -> dict[str, Any]:
    """Steps and seconds in which each kind has been seen once, at its share of all positions."""
    result: dict[str, Any] = {"tokens_per_s": tokens_per_s}
    share = report["packing"]["image_share"]
    positions = {
        "image": sum(c["train"] * c["document_positions"] for c in report["corpora"] if c["kind"] == "image"),
        "text": sum(c["tokens"] for c in report["corpora"] if c["kind"] == "text"),
    }
    for kind, part in (("image", share), ("text", 1 - share)):
        if positions[kind]:
            needed = positions[kind] / max(part, 1e-9)
            result[kind] = {
                "steps": needed / (data.rows_per_step * data.seq_len * report["packing"]["utilisation"]),
                "seconds": needed / tokens_per_s,
            }
    return result


def check_latents(data: MultimodalDataModule, module: TransfusionModule) -> dict[str, Any]:
    """Mean and scale of the latents of some pictures (they should be about 0 and 1), and how many are not finite."""
    pictures = data.mixture.images.pictures
    chosen = torch.stack([pictures[i].data() for i in spread(len(pictures), 64)])
    encoded = chosen.is_floating_point()  # before, into a latent cache
    latents = chosen if encoded else module.image_tokenizer.to("cpu").encode(chosen.float() / 127.5 - 1)
    finite = latents.isfinite().flatten(1).all(1)
    kept = latents[finite]
    return {
        "pictures": len(chosen),
        "not_finite": int((~finite).sum()),
        "shape": list(latents.shape[1:]),
        "mean": float(kept.mean()),
        "std": float(kept.std()),
    }


def records_of(table: Table) -> dict[str, int]:
    return {"records": len(table.dataset), "good": len(table.rows), "bad": len(table.bad)}


def spread(size: int, most: int) -> list[int]:
    """At most so many numbers below `size`, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, size - 1, min(size, most))})


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Smallest, middle, 95 % and largest."""
    levels = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: float(np.quantile(values, level)) for name, level in levels.items()} if len(values) else {}
