"""What one validation found: numbers with what they are of, and examples to look at.

Callbacks that measure have `findings`, of the latest validation: the same on every rank but for examples, which are
rank 0's. The table, `validation.json` and `report.html` are made from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image as PILImage


@dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        name: as it is logged, such as `val/openmoji/fd_reference`.
        value: the number.
        n: what it is of: tokens, pictures, captions, questions; None where it is not known.
        network: what it was measured with, where values compare only with those of the same network; else empty.
        standard_error: of the value, over its n; None where there is no estimate of it.
    """

    name: str
    value: float
    n: int | None
    network: str = ""
    standard_error: float | None = None


@dataclass(frozen=True)
class Example:
    """One picture with its texts.

    Attributes:
        corpus: its corpus' name.
        kind: `picture` where it was made from `text`, `caption` where `text` was written for it.
        picture: made, or given.
        text: the prompt, or what was written.
        truth: the true caption, where `text` was written.
        score: higher is better; None where nothing scores it.
        score_name: such as `clip_score_reference`.
    """

    corpus: str
    kind: Literal["picture", "caption"]
    picture: PILImage.Image
    text: str
    truth: str = ""
    score: float | None = None
    score_name: str = ""


@dataclass
class Findings:
    """What a callback found in one validation.

    Attributes:
        measurements: the numbers.
        examples: rank 0's, to look at.
        seconds: wall time of each part, by a name for people.
    """

    measurements: list[Measurement] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def share(name: str, right: int, n: int) -> Measurement:
    """The share of n that is right, and its standard error.

    That is sqrt(p (1 - p) / n) with p = (right + 1) / (n + 2), Laplace's estimate: of none or all right it is not 0.
    """
    p = (right + 1) / (n + 2)
    return Measurement(name, right / max(n, 1), n, standard_error=math.sqrt(p * (1 - p) / max(n, 1)))
