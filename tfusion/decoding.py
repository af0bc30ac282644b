"""The phases of mixed-modal decoding, for all samples of a call at once.

All samples are rows of one cache. Text is decoded for all rows until each has ended or emitted BOI; the waiting rows'
images are made together, by denoising (`denoising.py`) or id by id (`image_tokens.py`); EOI is appended; repeat.
With guidance a row has a null row beside it, whose prefix is the same without text (`[BOS][BOI]`). Every row draws
from its own generators, so a row of a batch equals the row alone.

Legend: R rows, D width, V vocabulary, C, h, w latent size.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Protocol

import torch
from PIL import Image as PILImage
from torch import Tensor

from tfusion.models.base import MultimodalModel
from tfusion.models.kv_cache import KVCache
from tfusion.replay import TokenSteps
from tfusion.requests import GenerationConfig
from tfusion.rows import Content, Sample, extend, without_text
from tfusion.sequence import BOI_ID, EOI_ID, EOS_ID, NUM_SPECIAL_IDS
from tfusion.token_sampling import sample_tokens
from tfusion.tokenizers import ImageTokenizer, TextTokenizer


class ImageMaker(Protocol):
    """How a model's images are made: `Denoiser` or `IdSampler`, where the methods are described."""

    def check(self, config: GenerationConfig) -> None: ...
    def content(self, latents: Tensor) -> Content: ...
    def kind(self, config: GenerationConfig) -> Hashable: ...
    def make(self, cache: KVCache, hidden: Tensor, rows: list[Sample]) -> tuple[Tensor, list[Content]]: ...


class Decoding:
    """One call of `generate`: its rows, their cache, and the phases."""

    def __init__(
        self,
        model: MultimodalModel,
        images: ImageMaker,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        rows: list[Sample],
    ) -> None:
        self.model, self.images, self.rows = model, images, rows
        self.text_tokenizer, self.image_tokenizer = text_tokenizer, image_tokenizer
        self.device, self.P = model.embedding.weight.device, model.num_patches
        guided = [r for r in rows if r.request.config.guidance_scale != 1 and r.request.generate != "text"]
        for place, row in enumerate(guided):
            row.null = len(rows) + place
        # a row that is done or waits writes a position of rubbish past its end
        capacity = max(row.limit for row in rows) + 1
        self.cache = self.model.make_cache(len(rows) + len(guided), capacity)
        prompts = [row.prompt for row in rows] + [without_text(row.prompt, model.vocab_size) for row in guided]
        self.hidden = extend(model, self.cache, prompts)  # (R, D), last position

    def run(self) -> None:
        for row in self.rows:
            row.state = "image" if row.request.generate == "image" else "text"
        while True:
            self.decode_text([i for i, row in enumerate(self.rows) if row.state == "text"])
            waiting = [i for i, row in enumerate(self.rows) if row.state == "image"]
            if not waiting:
                return
            self.make_images(waiting)

    def _select(self, rows: list[int]) -> KVCache:
        """The cache of some rows: a copy, or where they are all there are, the cache itself."""
        return self.cache if rows == list(range(len(self.cache.row_lengths))) else self.cache.select(rows)

    def _keep(self, cache: KVCache, order: list[int], places: Iterable[int]) -> None:
        """Take rows of a selection back into the cache of all."""
        if cache is self.cache:
            return
        places = list(places)
        self.cache.put([order[k] for k in places], cache, places)

    def decode_text(self, active: list[int]) -> None:
        """Go on with the text of these rows until each is done or wants an image."""
        if not active:
            return
        cache, hidden, order = self._select(active), self.hidden[active], list(active)
        steps = TokenSteps(self.model, cache)
        while True:
            tokens = self._next_tokens(hidden, [self.rows[i] for i in order], cache.row_lengths)
            contents: list[Content] = []
            for i, token, length in zip(order, tokens, cache.row_lengths, strict=True):
                contents.append([token] if self._take(self.rows[i], token, length) else [])
            going = [k for k, content in enumerate(contents) if content]
            if len(going) <= len(order) // 2:  # compact: ended rows cost as much as living ones
                waiting = [
                    k for k, content in enumerate(contents) if not content and self.rows[order[k]].state == "image"
                ]
                self._keep(cache, order, waiting)  # of a row that is done nothing is needed
                if not going:
                    return
                cache, order = cache.select(going), [order[k] for k in going]
                contents, steps = [contents[k] for k in going], TokenSteps(self.model, cache)
            hidden = steps(contents)

    def _take(self, row: Sample, token: int, length: int) -> bool:
        """Account for a sampled token; whether the row's text goes on."""
        if row.state != "text":
            return False
        if token == BOI_ID:
            row.end_text(self.text_tokenizer)
            row.state = "image"
            return False
        if token != EOS_ID:
            row.text.append(token)
            row.num_tokens += 1
        full = length + 1 >= row.limit or row.num_tokens >= row.request.config.max_new_tokens
        if token == EOS_ID or full:
            row.end_text(self.text_tokenizer)
            row.state = "done"
            return False
        return True

    def _next_tokens(self, hidden: Tensor, rows: list[Sample], lengths: list[int]) -> list[int]:
        banned = []
        for row, length in zip(rows, lengths, strict=True):
            config, kind = row.request.config, row.request.generate
            room = length + self.P + 2 <= row.limit and row.num_images < config.max_new_images
            no_eos = kind == "text" and row.num_tokens == 0  # asked for text: say something
            no_boi = not (kind == "any" and room)
            banned.append([True, True, no_eos, no_boi, True])  # by id; EOI is appended, never sampled
        logits = self.model.text_logits(hidden).float()  # (R, V)
        logits[:, :NUM_SPECIAL_IDS].masked_fill_(self._sent(banned), float("-inf"))
        configs, V = [row.request.config for row in rows], logits.shape[-1]
        if all(config.temperature == 0 for config in configs):
            return logits.argmax(-1).tolist()  # as below, without sorting
        # rows that wait or are done draw nothing: what they would draw is theirs to use later
        going = [row.state == "text" and row.request.config.temperature > 0 for row in rows]
        draws = [torch.rand((), generator=r.draws).item() if go else 0.0 for r, go in zip(rows, going, strict=True)]
        tokens = sample_tokens(
            logits,
            self._sent([config.temperature for config in configs]),
            self._sent([min(config.top_k or V, V) for config in configs]),
            self._sent([config.top_p or 1.0 for config in configs]),
            self._sent(draws),
        )
        return tokens.tolist()

    def _sent(self, values: list) -> Tensor:
        """Numbers onto the device, without waiting for what it is doing."""
        return torch.tensor(values).to(self.device, non_blocking=True)

    def make_images(self, waiting: list[int]) -> None:
        """Write BOI, make the images, and where the row goes on, write what is left of the image and EOI."""
        groups: dict[Hashable, list[int]] = {}
        for i in waiting:
            groups.setdefault(self.images.kind(self.rows[i].request.config), []).append(i)
        for members in groups.values():
            rows = [self.rows[i] for i in members]
            nulls = [row.null for row in rows if row.null is not None]
            cache = self._select(members + nulls)
            hidden = extend(self.model, cache, [[BOI_ID]] * len(cache.row_lengths))
            lengths = [length + self.P + 1 for length in cache.row_lengths]  # with the image and EOI
            latents, left = self.images.make(cache, hidden, rows)  # (R, C, h, w)
            for row, picture, length in zip(rows, self._to_pictures(latents), lengths[: len(rows)], strict=True):
                row.segments.append(picture)
                row.num_images += 1
                row.state = "done" if self._has_all(row) or length >= row.limit else "text"
            if all(row.state == "done" for row in rows):
                continue
            hidden = extend(self.model, cache, [[*content, EOI_ID] for content in left])
            self._keep(cache, members + nulls, range(len(members + nulls)))
            self.hidden[members] = hidden[: len(members)]

    def _has_all(self, row: Sample) -> bool:
        config, kind = row.request.config, row.request.generate
        if kind == "image":
            return row.num_images >= 1
        return row.num_tokens >= config.max_new_tokens

    def _to_pictures(self, latents: Tensor) -> list[PILImage.Image]:
        pixels = self.image_tokenizer.decode(latents)  # (R, 3, H, W) in [-1, 1]
        pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [PILImage.fromarray(picture) for picture in pixels]
