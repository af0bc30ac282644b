"""What a run is asked for during training, the same over and over: pictures by their captions, captions, texts.

Requests are dictionaries as in `prompts.jsonl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from tfusion.data.corpora import CaptionedImage, TextCorpus
from tfusion.data.sources import load_split, to_pil


def requests_of_pictures(
    pictures: Sequence[CaptionedImage], num_images: int, num_captions: int
) -> list[dict[str, Any]]:
    """The first pictures, to be made from their first captions and to be captioned."""
    first = [pictures[i] for i in range(min(len(pictures), max(num_images, num_captions)))]
    captions = [picture.captions[0] for picture in first[:num_images]]
    made = [{"segments": [c], "generate": "image", "seed": i} for i, c in enumerate(captions)]
    return made + [{"segments": [to_pil(p)], "generate": "text"} for p in first[:num_captions]]


def requests_of_texts(corpora: Sequence[TextCorpus], num_texts: int, num_characters: int) -> list[dict[str, Any]]:
    """The first held-out lines of some length, to be continued from their first characters."""
    lines = (
        line
        for corpus in corpora
        for text in corpus.load("val") or load_split(corpus, "train")
        for line in text.splitlines()
    )
    openings = islice((f"{line}\n"[:num_characters] for line in lines if len(line) > 30), num_texts)
    settings = {"generate": "text", "temperature": 0.8, "top_p": 0.95}
    return [{"segments": [opening], "seed": i, **settings} for i, opening in enumerate(openings)]
