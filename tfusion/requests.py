"""What one asks of a model and what one gets back: `Request`, `GenerationConfig`, `Generation`.

A request is a list of segments (text, images) and what should follow them. The same dictionaries are lines of
`prompts.jsonl` and arguments of `model.generate([...])`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image as PILImage

from tfusion.pictures import to_rgb
from tfusion.samplers import SamplerName

Target = Literal["image", "text", "any"]
Segment = str | PILImage.Image


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode. Each field may also stand in a line of `prompts.jsonl`; the line wins.

    Args:
        sampler: diffusion sampler; None = `ddpm` (the paper's) for a DDPM process, `euler` for a flow.
        num_inference_steps: network evaluations an image (paper: 250); not of Chameleon's, which has one an id.
        guidance_scale: classifier-free guidance; 1 = off, one forward instead of two (paper: 5, or 3 in ablations). Of
            Chameleon it acts on the logits of image ids.
        guidance_interval: where guidance acts, in fractions of the noise range, 0 = clean, 1 = noise; outside, the null
            row is not computed (Kynkaanniemi et al. 2024, arXiv 2404.07724).
        temperature: of text sampling; 0 = greedy.
        top_k: keep the k likeliest tokens; None = all.
        top_p: keep the smallest set of tokens with this much probability; None = all.
        image_temperature, image_top_k, image_top_p: the same of image ids, where images are ids (Chameleon); 1, None
            and None = the model's own distribution.
        max_new_tokens: text tokens generated a request, over all its text segments.
        max_new_images: images generated a request of kind `any`; kind `image` makes one.
    """

    sampler: SamplerName | None = None
    num_inference_steps: int = 250
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    image_temperature: float = 1.0
    image_top_k: int | None = None
    image_top_p: float | None = None
    max_new_tokens: int = 128
    max_new_images: int = 1

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"generation setting {name}={getattr(self, name)!r}: expected {expected}")

        require("sampler", self.sampler in (None, "ddpm", "ddim", "dpmpp", "euler"), "ddpm, ddim, dpmpp or euler")
        for name in ("num_inference_steps", "max_new_tokens", "max_new_images"):
            require(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, "a whole number >= 1")
        require("guidance_scale", _is_number(self.guidance_scale) and self.guidance_scale >= 0, "a number >= 0")
        interval = self.guidance_interval
        fits = isinstance(interval, list | tuple) and len(interval) == 2 and all(map(_is_number, interval))
        fits = fits and 0 <= interval[0] <= interval[1] <= 1
        require("guidance_interval", fits, "two numbers with 0 <= low <= high <= 1, such as [0.1, 0.7]")
        object.__setattr__(self, "guidance_interval", tuple(map(float, interval)))
        for of in ("", "image_"):
            temperature, top_k, top_p = (getattr(self, of + name) for name in ("temperature", "top_k", "top_p"))
            positive = _is_number(temperature) and temperature >= 0
            require(f"{of}temperature", positive, "a number >= 0 (0 = greedy)")
            require(f"{of}top_k", top_k is None or (_is_int(top_k) and top_k >= 1), "a whole number >= 1")
            require(f"{of}top_p", top_p is None or (_is_number(top_p) and 0 < top_p <= 1), "0 < top_p <= 1")


@dataclass(frozen=True)
class Request:
    """`segments` given, then what is wanted: an image, text, or whatever the model comes up with (`any`).

    Raises:
        ValueError: a segment that is neither a string nor a PIL picture.
    """

    segments: tuple[Segment, ...]
    generate: Target = "any"
    n: int = 1  # samples; sample k uses the generators seeded by (seed, k)
    seed: int = 0
    config: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        for segment in self.segments:
            if not isinstance(segment, (str, PILImage.Image)):
                raise ValueError(
                    f"segment {segment!r}: a Request holds strings and PIL pictures; dictionaries and paths belong to "
                    'the dictionary form, {"segments": [...], "generate": ...}, in its place'
                )


@dataclass(frozen=True)
class Generation:
    """One sample: `segments` holds what was generated (not the prompt), text as str and images as PIL."""

    request: int
    sample: int
    segments: tuple[Segment, ...]


_CONFIG_KEYS = {f.name for f in dataclasses.fields(GenerationConfig)}
_REQUEST_KEYS = {"segments", "generate", "n", "seed"}


def parse_request(line: dict[str, Any] | Request, defaults: GenerationConfig, folder: Path = Path(".")) -> Request:
    """A `Request` from the dictionary form.

    Args:
        line: `{"segments": [{"text": "red heart"}, {"image": "cat.png"}], "generate": "image", "n": 1, "seed": 0}`
            plus any field of `GenerationConfig`. A segment may also be a bare string or a PIL image.
        defaults: settings for the fields that the line does not name.
        folder: image paths are relative to it.

    Raises:
        ValueError: an unknown key, a wrong type or value, an image that cannot be read; the message names it.
    """
    if isinstance(line, Request):
        return line
    if not isinstance(line, dict):
        raise ValueError(f'got {type(line).__name__}, expected an object such as {{"segments": [{{"text": "..."}}]}}')
    unknown = sorted(set(line) - _REQUEST_KEYS - _CONFIG_KEYS)
    if unknown:
        form = "" if "segments" in line else ' (the prompt goes into "segments", such as {"segments": ["red heart"]})'
        raise ValueError(f"unknown keys {unknown}, expected some of {sorted(_REQUEST_KEYS | _CONFIG_KEYS)}{form}")
    segments = line.get("segments")
    if not isinstance(segments, (list, tuple)):
        raise ValueError(f'key "segments": got {segments!r}, expected a list such as [{{"text": "red heart"}}]')
    generate, n, seed = line.get("generate", "any"), line.get("n", 1), line.get("seed", 0)
    if generate not in ("image", "text", "any"):
        raise ValueError(f'key "generate": got {generate!r}, expected "image", "text" or "any"')
    if not _is_int(n) or n < 1:
        raise ValueError(f'key "n": got {n!r}, expected a whole number of samples >= 1')
    if not _is_int(seed) or seed < 0:
        raise ValueError(f'key "seed": got {seed!r}, expected a whole number >= 0')
    config = dataclasses.replace(defaults, **{k: v for k, v in line.items() if k in _CONFIG_KEYS})
    return Request(tuple(_parse_segment(s, folder) for s in segments), generate, n, seed, config)


def _parse_segment(segment: Any, folder: Path) -> Segment:
    if isinstance(segment, PILImage.Image):
        return to_rgb(segment)[0]
    if isinstance(segment, str):
        return segment
    if isinstance(segment, dict) and len(segment) == 1:
        kind, value = next(iter(segment.items()))
        if kind == "text" and isinstance(value, str):
            return value
        if kind == "image" and isinstance(value, PILImage.Image):
            return to_rgb(value)[0]
        if kind == "image" and isinstance(value, (str, Path)):
            path = folder / value
            try:
                with PILImage.open(path) as image:
                    picture = to_rgb(image)[0]
            except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError) as error:
                hint = f"; relative paths are taken from {folder.absolute()}" if not path.exists() else ""
                raise ValueError(f"image {str(path)!r} cannot be read ({error}){hint}") from error
            picture.info["path"] = str(value)  # so that what is made of it can say so
            return picture
    raise ValueError(f'segment {segment!r}: expected {{"text": "..."}} or {{"image": "path.png"}}')


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
