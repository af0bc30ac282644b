"""The phases of mixed-modal decoding, for all samples of a call at once.

All samples are rows of one cache. Text is decoded for all rows until each has ended or emitted BOI; the waiting rows'
images are denoised together; EOI is appended; repeat. While denoising, the keys and values of what came before are
fixed, and only the image's own P positions run; the clean patches are then written once, at timestep 0. Guidance runs
a conditional and a null row in one forward, the null row's prefix being the same without text (`[BOS][BOI]`). Every
row draws from its own generators, so a row of a batch equals the row alone.

Legend: R rows, T new positions, P patches, D width, V vocabulary, C, h, w latent size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from PIL import Image as PILImage
from torch import Tensor

from tfusion.diffusion import NoiseProcess
from tfusion.models.kv_cache import CacheView, KVCache
from tfusion.models.transfusion import Transfusion
from tfusion.randomness import generator
from tfusion.requests import GenerationConfig, Request, Segment
from tfusion.samplers import Sampler, SamplerName
from tfusion.sequence import BOI_ID, BOS_ID, EOI_ID, EOS_ID, NUM_SPECIAL_IDS, PAD_ID
from tfusion.token_sampling import sample_tokens
from tfusion.tokenizers import ImageTokenizer, TextTokenizer

Content = list[int | Tensor]  # what a row is extended by: token ids, and clean latents (C, h, w) for P patches


def length_of(content: Content, num_patches: int) -> int:
    """Positions it takes."""
    return sum(1 if isinstance(item, int) else num_patches for item in content)


@dataclass
class Sample:
    """One sample on its way."""

    number: int
    sample: int
    request: Request
    prompt: Content
    limit: int  # positions it may take
    draws: torch.Generator  # of its tokens
    state: str = "text"  # text | image | done
    segments: list[Segment] = field(default_factory=list)
    text: list[int] = field(default_factory=list)  # since the last image
    num_tokens: int = 0
    num_images: int = 0
    null: int | None = None  # the cache row of its null prompt

    def end_text(self, tokenizer: TextTokenizer) -> None:
        if self.text:
            self.segments.append(tokenizer.decode(self.text))
            self.text = []


class Decoding:
    """One call of `generate`: its rows, their cache, and the phases."""

    def __init__(
        self,
        model: Transfusion,
        process: NoiseProcess,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        rows: list[Sample],
    ) -> None:
        self.model, self.process, self.rows = model, process, rows
        self.text_tokenizer, self.image_tokenizer = text_tokenizer, image_tokenizer
        self.device, self.P = model.embedding.weight.device, model.num_patches
        # states of the diffusion stay in fp32 at least
        self.dtype = torch.promote_types(model.embedding.weight.dtype, torch.float32)
        guided = [r for r in rows if r.request.config.guidance_scale != 1 and r.request.generate != "text"]
        for place, row in enumerate(guided):
            row.null = len(rows) + place
        # rows that extend by fewer positions than others write rubbish past their end
        capacity = max(row.limit for row in rows) + max(self.P + 2, *(length_of(r.prompt, self.P) for r in rows))
        self.cache = self.model.make_cache(len(rows) + len(guided), capacity)
        null_prompts = [self._without_text(row.prompt) for row in guided]
        self.hidden = self.extend(self.cache, [*(row.prompt for row in rows), *null_prompts])  # (R, D), last position

    def _without_text(self, prompt: Content) -> Content:
        """The null prompt: images and markers stay."""
        return [item for item in prompt if not isinstance(item, int) or item in (BOS_ID, BOI_ID, EOI_ID)]

    def run(self) -> None:
        for row in self.rows:
            row.state = "image" if row.request.generate == "image" else "text"
        while True:
            self.decode_text([i for i, row in enumerate(self.rows) if row.state == "text"])
            waiting = [i for i, row in enumerate(self.rows) if row.state == "image"]
            if not waiting:
                return
            self.make_images(waiting)

    def extend(self, cache: KVCache, contents: list[Content]) -> Tensor:
        """Write each row's content behind what it has; hidden state at each row's last new position, (R, D)."""
        counts = [length_of(content, self.P) for content in contents]
        R, T = len(contents), max(counts)
        ids = torch.full((R, T), PAD_ID)
        image_ids = torch.full((R, T), -1)
        latents, at_patches = [], []
        for r, content in enumerate(contents):
            at = 0
            for item in content:
                if isinstance(item, int):
                    ids[r, at] = item
                    at += 1
                else:
                    image_ids[r, at : at + self.P] = cache.row_lengths[r] + at  # where it starts names it
                    at_patches.append(torch.arange(self.P) + r * T + at)
                    latents.append(item)
                    at += self.P
        image_ids = image_ids.to(self.device)
        x = self.model.embedding(ids.to(self.device))  # (R, T, D)
        if latents:
            clean = torch.stack(latents)
            patches, _ = self.model.patch_encoder(clean, clean.new_zeros(len(latents)))  # (images, P, D)
            index = torch.cat(at_patches).to(self.device)
            x = x.view(R * T, -1).index_copy(0, index, patches.flatten(0, 1)).view(R, T, -1)
        view = cache.view(self.model.seen_together(image_ids), write=True)
        hidden = self.model.transformer(x, self._positions(view.index), cache=view)
        view.advance(counts)
        if T == 1:
            return hidden[:, 0]
        last = torch.tensor([max(count - 1, 0) for count in counts], device=self.device)
        return hidden[torch.arange(R, device=self.device), last]

    def _keep(self, cache: KVCache, order: list[int], places: Iterable[int]) -> None:
        """Take rows of a selection back into the cache of all."""
        places = list(places)
        self.cache.put([order[k] for k in places], cache, places)

    def _positions(self, index: Tensor) -> Tensor:
        return index.clamp(max=self.model.max_seq_len - 1)  # past the end only rubbish is written

    def decode_text(self, active: list[int]) -> None:
        """Go on with the text of these rows until each is done or wants an image."""
        if not active:
            return
        cache, hidden, order = self.cache.select(active), self.hidden[active], list(active)
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
                contents = [contents[k] for k in going]
            hidden = self.extend(cache, contents)

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
        logits = self.model.text_head(hidden).float()  # (R, V)
        logits[:, :NUM_SPECIAL_IDS].masked_fill_(torch.tensor(banned, device=self.device), float("-inf"))
        configs, V = [row.request.config for row in rows], logits.shape[-1]
        if all(config.temperature == 0 for config in configs):
            return logits.argmax(-1).tolist()  # as below, without sorting
        # rows that wait or are done draw nothing: what they would draw is theirs to use later
        going = [row.state == "text" and row.request.config.temperature > 0 for row in rows]
        draws = [torch.rand((), generator=r.draws).item() if go else 0.0 for r, go in zip(rows, going, strict=True)]
        tokens = sample_tokens(
            logits,
            torch.tensor([config.temperature for config in configs], device=self.device),
            torch.tensor([min(config.top_k or V, V) for config in configs], device=self.device),
            torch.tensor([config.top_p or 1.0 for config in configs], device=self.device),
            torch.tensor(draws, device=self.device),
        )
        return tokens.tolist()

    def make_images(self, waiting: list[int]) -> None:
        """Write BOI, denoise, and where the row goes on, write the clean patches and EOI."""
        groups: dict[tuple[SamplerName | None, int], list[int]] = {}
        for i in waiting:
            request = self.rows[i].request
            key = (request.config.sampler, request.config.num_inference_steps)
            groups.setdefault(key, []).append(i)
        for (name, steps), members in groups.items():
            rows = [self.rows[i] for i in members]
            nulls = [row.null for row in rows if row.null is not None]
            cache = self.cache.select(members + nulls)
            self.extend(cache, [[BOI_ID]] * len(cache.row_lengths))
            x_0 = self._denoise(cache, rows, Sampler(self.process, name, steps))  # (R, C, h, w)
            for row, picture in zip(rows, self._to_pictures(x_0), strict=True):
                row.segments.append(picture)
                row.num_images += 1
                row.state = "done" if self._has_all(row) else "text"
            if all(row.state == "done" for row in rows):
                continue
            guided = [k for k, row in enumerate(rows) if row.null is not None]
            contents: list[Content] = [[latents, EOI_ID] for latents in [*x_0, *x_0[guided]]]
            hidden = self.extend(cache, contents)
            self._keep(cache, members + nulls, range(len(members + nulls)))
            self.hidden[members] = hidden[: len(members)]

    def _has_all(self, row: Sample) -> bool:
        config, kind = row.request.config, row.request.generate
        if kind == "image":
            return row.num_images >= 1
        return row.num_tokens >= config.max_new_tokens

    def _denoise(self, cache: KVCache, rows: list[Sample], sampler: Sampler) -> Tensor:
        """From noise to x_0 (R, C, h, w); the cache holds the rows, then the null rows of the guided ones."""
        shape = self.model.latent_shape
        draws = [generator("image", row.request.seed, row.sample, row.num_images) for row in rows]
        x_t = torch.stack([torch.randn(shape, generator=g) for g in draws]).to(self.device, self.dtype)
        R = len(rows)
        guided = torch.tensor([r for r, row in enumerate(rows) if row.null is not None], dtype=torch.long)
        scales = self._guidance_scales([rows[r].request.config for r in guided.tolist()], sampler.timesteps)
        needed = (scales != 1).any(1).tolist()  # at which steps
        scales, guided = scales.to(self.device, x_t.dtype)[:, :, None, None, None], guided.to(self.device)

        own = torch.arange(R, device=self.device)
        images, view = torch.cat([own, guided]), self._image_view(cache)  # whose image a row of the cache denoises
        unguided = view if all(needed) else self._image_view(cache.select(list(range(R))))
        for index, timestep in enumerate(sampler.timesteps):
            timesteps = torch.full((R,), timestep, device=self.device, dtype=x_t.dtype)
            if needed[index]:
                output = self._predict(x_t, timesteps, images, view)
                output, null = output[:R], output[R:]
                # classifier-free guidance (Ho & Salimans 2022, eq. 6, with scale = 1 + w)
                output = output.index_copy(0, guided, null + scales[index] * (output[guided] - null))
            else:
                output = self._predict(x_t, timesteps, own, unguided)
            x_t = sampler.step(output, index, x_t, draws)
        return x_t

    def _guidance_scales(self, configs: list[GenerationConfig], timesteps: list[float]) -> Tensor:
        """(steps, G): 1 = none, outside of a row's interval (arXiv 2404.07724)."""
        scale = torch.tensor([config.guidance_scale for config in configs], dtype=torch.float64)
        intervals = torch.tensor([config.guidance_interval for config in configs], dtype=torch.float64).view(-1, 2)
        times = torch.tensor(timesteps, dtype=torch.float64)[:, None] / self.process.num_train_timesteps  # (steps, 1)
        inside = (intervals[:, 0] <= times) & (times <= intervals[:, 1])
        return torch.where(inside, scale, 1.0)

    def _image_view(self, cache: KVCache) -> CacheView:
        """Of one image behind what each row has, its patches beside the cache."""
        return cache.view(self.model.seen_together(cache.lengths[:, None].expand(-1, self.P)), write=False)

    def _predict(self, x_t: Tensor, timesteps: Tensor, images: Tensor, view: CacheView) -> Tensor:
        """What the network says of (R, C, h, w), the image `images[n]` of them behind row n of the cache."""
        patches, skip = self.model.patch_encoder(x_t, timesteps)  # (R, P, D); knows no text: once for both its rows
        hidden = self.model.transformer(patches[images], self._positions(view.index), cache=view)
        output = self.model.patch_decoder(hidden, tuple(part[images] for part in skip), timesteps[images])
        return output.to(x_t.dtype)

    def _to_pictures(self, x_0: Tensor) -> list[PILImage.Image]:
        pixels = self.image_tokenizer.decode(x_0)  # (R, 3, H, W) in [-1, 1]
        pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [PILImage.fromarray(picture) for picture in pixels]
