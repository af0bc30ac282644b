"""Pictures in the report: grids of those made, captions written for others, the worst and the best."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image as PILImage

from tfusion.metrics.measurement import Example

LARGEST_PNG_PX = 128  # a larger picture is a JPEG
SIDE_PX = 96  # a small picture is shown at the multiple of its size that is nearest
LARGE_SIDE_PX = 160  # at which a picture larger than that is shown
MOST_EXTREME = 8  # pictures shown as the best, and as the worst


def data_uri(picture: PILImage.Image) -> str:
    """The picture itself as an address: PNG, which is exact, or JPEG where it is large; on white if transparent."""
    if picture.mode != "RGB":
        picture = picture.convert("RGBA")
        picture = PILImage.alpha_composite(PILImage.new("RGBA", picture.size, "white"), picture).convert("RGB")
    kind, options = ("png", {}) if max(picture.size) <= LARGEST_PNG_PX else ("jpeg", {"quality": 90})
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def grids(examples: Sequence[Example], shown: int) -> str:
    """The first `shown` pictures made of each corpus, their prompts under them."""
    return _by_corpus(examples, "picture", lambda some: _grid(some[:shown], len(some)))


def captions(examples: Sequence[Example], shown: int) -> str:
    """The first `shown` pictures given of each corpus, with what was written for them and the true captions."""
    return _by_corpus(examples, "caption", lambda some: _grid(some[:shown], len(some)))


def extremes(examples: Sequence[Example]) -> str:
    """The best and the worst of each corpus, kind and score: half of what has a score, at most 8."""
    groups: dict[tuple[str, str, str], list[Example]] = {}
    for example in examples:
        if example.score is not None and example.score == example.score:  # NaN is neither good nor bad
            groups.setdefault((example.corpus, example.kind, example.score_name), []).append(example)
    parts = []
    for (corpus, kind, score_name), some in groups.items():
        count = min(MOST_EXTREME, len(some) // 2)
        if not count:
            continue
        some.sort(key=lambda example: example.score or 0.0)
        what = "pictures made" if kind == "picture" else "captions written"
        title = f"{escape(corpus)}: {what}, by {escape(score_name or 'score')}"
        parts.append(f"<h3>{title}</h3>")
        for name, few in (("Best", some[: -count - 1 : -1]), ("Worst", some[:count])):
            parts.append(f"<h4>{name} {count}</h4>{_grid(few, count, scored=True)}")
    return "\n".join(parts)


def _by_corpus(examples: Sequence[Example], kind: str, draw: Callable[[list[Example]], str]) -> str:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        if example.kind == kind:
            groups.setdefault(example.corpus, []).append(example)
    return "\n".join(f"<h3>{escape(corpus)}</h3>{draw(some)}" for corpus, some in groups.items())


def _grid(examples: Sequence[Example], total: int, scored: bool = False) -> str:
    """Pictures with their texts, in as many columns as fit, and a line where they are the first of `total` only.

    How many were made is in the table: of many, only some are kept as examples.
    """
    if not examples:
        return ""
    natural = max(max(example.picture.size) for example in examples)
    side = natural * max(1, round(SIDE_PX / natural)) if natural <= LARGEST_PNG_PX else LARGE_SIDE_PX
    kind = examples[0].kind
    figures = "\n".join(_figure(example, scored) for example in examples)
    some = f"<p>The first {len(examples)}.</p>" if len(examples) < total else ""
    pixels = " pixels" if natural < side else ""
    return f'{some}<div class="grid {kind}{pixels}" style="--side: {side}px">\n{figures}\n</div>'


def _figure(example: Example, scored: bool) -> str:
    score = ""
    if scored and example.score is not None:
        score = f'<span class="score">{example.score:.4g}</span>'
    if example.kind == "picture":
        alt = f"picture made for: {example.text}"
        text = f"<span>{escape(example.text)}</span>"
    else:
        alt = f"picture given, of: {example.truth}" if example.truth else "picture given"
        same = example.text.strip() == example.truth.strip()
        texts = {"written, and true": example.text} if same else {"written": example.text, "true": example.truth}
        items = (f"<dt>{k}</dt><dd>{escape(v) or '<i>nothing</i>'}</dd>" for k, v in texts.items())
        text = f"<dl>{''.join(items)}</dl>"
    image = f'<img src="{data_uri(example.picture)}" alt="{escape(alt)}">'
    return f"<figure>{image}<figcaption>{text}{score}</figcaption></figure>"
