"""CLIP score (Hessel et al. 2021): how well pictures fit their captions, by a CLIP of transformers.

torchmetrics' CLIPScore does not run with transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class Clip:
    """A CLIP; its metric is `clip_score`, 100 x the mean of max(cosine, 0) of picture and caption (as torchmetrics).

    Values compare only where the CLIP is the same. Captions longer than it reads are cut.

    Args:
        model: a folder as `save_pretrained` of CLIPModel and CLIPProcessor writes it, or a name on the Hugging Face
            hub, such as openai/clip-vit-base-patch32 (from its cache, else downloaded).
    """

    score_name = "clip_score"

    def __init__(self, model: str) -> None:
        self.model = self.fingerprint = model

    def load(self, device: torch.device) -> None:
        """Read model and processor; raises ValueError, worded for the user, where that cannot be done."""
        try:
            try:
                self._read(local_files_only=True)
            except OSError:  # not a folder, and not in the hub's cache
                self._read(local_files_only=False)
        except Exception as error:  # transformers and the hub have their own kinds
            raise ValueError(
                f"Clip: {self.model!r} cannot be loaded ({type(error).__name__}: {str(error)[:300]}); "
                "give a folder with config.json, model.safetensors, preprocessor_config.json and tokenizer files "
                "of a CLIP, or its name on the Hugging Face hub where that can be reached"
            ) from error
        self.network = self.network.float().to(device).eval().requires_grad_(False)
        self.device = device

    def _read(self, local_files_only: bool) -> None:
        from transformers import AutoConfig, CLIPModel, CLIPProcessor

        kind = AutoConfig.from_pretrained(self.model, local_files_only=local_files_only).model_type
        if kind != "clip":
            raise ValueError(f"it is of type {kind!r}, expected 'clip'")
        self.network, report = CLIPModel.from_pretrained(
            self.model, local_files_only=local_files_only, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers would draw them at random
            raise ValueError(f"its file lacks {sorted(report['missing_keys'])[:3]}, ...")
        self.processor = CLIPProcessor.from_pretrained(self.model, local_files_only=local_files_only)

    @torch.no_grad()
    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """(N,) cosine of each uint8 RGB picture (N, 3, H, H) and its caption."""
        most = self.network.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=list(captions),
            images=list(images.cpu()),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=most,
        )
        found = self.network(**inputs.to(self.device))  # embeds have length 1
        return (found.image_embeds * found.text_embeds).sum(-1)


class ClipScore(Metric):
    """100 x the mean of max(cosine, 0) over pairs of picture and caption: sums, so ranks and batches change nothing."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "squares", "pairs"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, cosines: Tensor) -> None:
        """Add (N,) cosines."""
        scores = pair_scores(cosines)
        self.total += scores.sum()
        self.squares += scores.square().sum()
        self.pairs += len(cosines)

    def compute(self) -> tuple[float, float]:
        """The mean and its standard error."""
        pairs = max(self.pairs.item(), 1)
        mean = self.total.item() / pairs
        variance = max(self.squares.item() / pairs - mean**2, 0.0)
        return mean, (variance / max(pairs - 1, 1)) ** 0.5


def pair_scores(cosines: Tensor) -> Tensor:
    """100 x max(cosine, 0), float64."""
    return 100 * cosines.double().clamp(min=0)
