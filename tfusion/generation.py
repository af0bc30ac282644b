"""Mixed-modal decoding (Transfusion §3, "Inference"): text token by token, images as the model makes them, from BOI on.

This file turns requests into prompts and checks them; `decoding.py` runs them.
"""

from __future__ import annotations

import copy

import torch
from PIL import Image as PILImage
from torch import Tensor

from tfusion.decoding import Decoding, ImageMaker
from tfusion.denoising import Denoiser
from tfusion.diffusion import NoiseProcess
from tfusion.image_tokens import IdSampler
from tfusion.models.base import MultimodalModel
from tfusion.pictures import fit_square, to_rgb
from tfusion.randomness import generator
from tfusion.requests import Generation, Request
from tfusion.rows import Content, Sample
from tfusion.sequence import BOI_ID, BOS_ID, EOI_ID
from tfusion.tokenizers import ImageTokenizer, TextTokenizer


def bf16_copy(model: MultimodalModel) -> MultimodalModel:
    """A copy with bf16 weights and fp32 tables: what generation runs on where training is bf16-mixed."""
    halves = {id(p): torch.nn.Parameter(p.detach().to(torch.bfloat16), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, halves)  # so that no second fp32 copy is ever there


class Generator:
    """Generate from a model.

    Args:
        model: weights of one type, no autocast (`bf16_copy` for bf16).
        process: what the model was trained with; None for a Chameleon, whose images are ids.
        text_tokenizer, image_tokenizer: the model's.
    """

    def __init__(
        self,
        model: MultimodalModel,
        process: NoiseProcess | None,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
    ) -> None:
        self.model = model
        self.images: ImageMaker = IdSampler(model) if process is None else Denoiser(model, process)
        self.text_tokenizer, self.image_tokenizer = text_tokenizer, image_tokenizer
        self.device = model.embedding.weight.device
        # latents stay in fp32 at least
        self.dtype = torch.promote_types(model.embedding.weight.dtype, torch.float32)

    @torch.no_grad()
    def generate(
        self, requests: list[Request], numbers: list[int] | None = None, batch_size: int | None = None
    ) -> list[Generation]:
        """All samples of all requests, in order.

        Args:
            requests: any mixture of kinds and settings.
            numbers: what the requests are called; None = 0, 1, ...
            batch_size: samples decoded together, which bounds the memory; None = all.

        Raises:
            ValueError: a prompt that leaves no room, or settings that the model does not have; before any work.
        """
        numbers = list(range(len(requests))) if numbers is None else numbers
        limits = self.check(requests, numbers)
        wanted = [(i, sample) for i, request in enumerate(requests) for sample in range(request.n)]
        together = batch_size or max(1, len(wanted))
        made: list[Generation] = []
        for start in range(0, len(wanted), together):
            some = wanted[start : start + together]
            asked = list(dict.fromkeys(i for i, _ in some))
            prompts = dict(zip(asked, self._prompts([requests[i] for i in asked]), strict=True))
            rows = []
            for i, sample in some:
                draws = generator("tokens", requests[i].seed, sample)
                rows.append(Sample(numbers[i], sample, requests[i], prompts[i], limits[i], draws))
            Decoding(self.model, self.images, self.text_tokenizer, self.image_tokenizer, rows).run()
            made += [Generation(row.number, row.sample, tuple(row.segments)) for row in rows]
        return made

    def check(self, requests: list[Request], numbers: list[int] | None = None) -> list[int]:
        """How many positions each request's rows may take; raises ValueError for one that cannot be met."""
        limits, checked = [], set()
        for number, request in zip(numbers or range(len(requests)), requests, strict=True):
            self._check_kind(number, request)
            if request.config not in checked:  # a look makes a scheduler of diffusers
                self.images.check(request.config)
                checked.add(request.config)
            limits.append(self._limit(number, request))
        return limits

    def _check_kind(self, number: int, request: Request) -> None:
        """Refuse what this model does not read or predict."""
        pictures = request.generate != "text" or any(not isinstance(segment, str) for segment in request.segments)
        if pictures and self.model.latent_shape is None:
            raise ValueError(f"request {number} has to do with images, of which the model knows nothing: ask for text")
        if pictures and isinstance(self.images, IdSampler) and not hasattr(self.image_tokenizer, "codebook_size"):
            raise ValueError(
                f"request {number} has to do with images, but the module has no image_tokenizer: ask for text, or give "
                "it the VQTokenizer"
            )
        if request.generate != "image" and not self.model.predicts_text:
            raise ValueError(
                f"request {number} asks for {request.generate!r}, but the model predicts no text: ask for an image"
            )

    def _prompts(self, requests: list[Request]) -> list[Content]:
        """What each request's rows begin with; the pictures of all of them are encoded together."""
        pictures = [segment for request in requests for segment in request.segments if not isinstance(segment, str)]
        latents = iter(self._latents(pictures) if pictures else ())
        prompts = []
        for request in requests:
            prompt: Content = [BOS_ID]
            for segment in request.segments:
                if isinstance(segment, str):
                    prompt += self.text_tokenizer.encode(segment)
                else:
                    prompt += [BOI_ID, *self.images.content(next(latents)), EOI_ID]
            prompts.append(prompt)
        return prompts

    def _latents(self, pictures: list[PILImage.Image]) -> Tensor:
        """Clean latents (pictures, C, h, w), each resized to the model's size (square, centre crop)."""
        size = self._image_size()
        cut = [fit_square(to_rgb(picture)[0], size).tobytes() for picture in pictures]
        pixels = torch.frombuffer(bytearray(b"".join(cut)), dtype=torch.uint8).view(-1, size, size, 3)
        pixels = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # (pictures, 3, H, W)
        return self.image_tokenizer.encode(pixels).to(self.dtype)

    def _image_size(self) -> int:
        """The picture size whose latents are the model's."""
        side = self.model.latent_shape[1]
        factor = next(f for f in (1, 2, 4, 8, 16, 32) if self._gives(side * f))
        return side * factor

    def _gives(self, size: int) -> bool:
        try:
            return tuple(self.image_tokenizer.latent_shape(size)) == self.model.latent_shape
        except ValueError:
            return False

    def _limit(self, number: int, request: Request) -> int:
        """How many positions a row may take, at most the model's."""
        image = self.model.num_patches + 2
        texts = [segment for segment in request.segments if isinstance(segment, str)]
        prompt = (
            1 + sum(map(len, self.text_tokenizer.encode_batch(texts))) + image * (len(request.segments) - len(texts))
        )
        needed = prompt + (image if request.generate == "image" else 1)
        if needed > self.model.max_seq_len:
            raise ValueError(
                f"request {number}: its prompt takes {prompt} positions and what it asks for at least "
                f"{needed - prompt}, but the model's max_seq_len is {self.model.max_seq_len}: shorten the prompt"
            )
        config = request.config
        tokens, images = {
            "image": (0, 1),
            "text": (config.max_new_tokens, 0),
            "any": (config.max_new_tokens, config.max_new_images),
        }[request.generate]
        return min(self.model.max_seq_len, prompt + tokens + images * image)
