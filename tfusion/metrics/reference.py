"""The reference encoder as a network to measure with: `fd_reference`, `kd_reference` and `clip_score_reference`.

It needs no download. Its weights and its card (data, attribution, recipe, how it answers to faults) are
`reference_encoder.safetensors` and `reference_encoder.md` beside this file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tfusion.metrics.networks import resized
from tfusion.models.reference_encoder import ReferenceEncoder
from tfusion.sequence import BOI_ID, BOS_ID, PAD_ID
from tfusion.tokenizers import TextTokenizer

SHIPPED = Path(__file__).with_name("reference_encoder.safetensors")


class Reference:
    """The package's own dual encoder, of drawings and generated scenes: scores compare only within this package.

    Features are its vectors of pictures before they are normalised, 128 numbers, so that 129 pictures are enough for a
    Frechet distance. Captions longer than it reads (46 tokens) are cut.

    Args:
        weights: a file that `python -m tfusion.bench.reference_encoder --out` wrote; None = the one in the package.
    """

    name, score_name = "fd_reference", "clip_score_reference"

    def __init__(self, weights: str | None = None) -> None:
        self.path = SHIPPED if weights is None else Path(weights)

    def load(self, device: torch.device) -> None:
        """Read weights, tokenizer and sizes."""
        if not self.path.is_file():
            raise ValueError(
                f"Reference: got weights {str(self.path)!r}, which is no file; leave them out, or give one"
            )
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
            self.tokenizer = TextTokenizer.from_json(metadata["tokenizer"])
            self.network = ReferenceEncoder(**json.loads(metadata["sizes"])).materialize(device, seed=0)
            self.network.load_state_dict(state)
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"Reference: {str(self.path)!r} is no reference encoder ({type(error).__name__}: {str(error)[:200]}); "
                "leave weights out, or give what python -m tfusion.bench.reference_encoder --out wrote"
            ) from error
        self.network.eval().requires_grad_(False)
        self.device, self.num_features = device, self.network.dim
        with open(self.path, "rb") as file:
            self.fingerprint = f"reference {hashlib.file_digest(file, 'sha256').hexdigest()}"

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 128) fp32 of uint8 RGB pictures (N, 3, H, H)."""
        if images.dtype != torch.uint8:
            raise ValueError(f"Reference: got pictures of {images.dtype}, expected uint8 from 0 to 255")
        return self.network.image_features(resized(images.to(self.device), self.network.image_size) / 127.5 - 1)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """(N, 128) fp32 of captions."""
        longest = self.network.max_seq_len - 2
        rows = [[BOS_ID, *ids[:longest], BOI_ID] for ids in self.tokenizer.encode_batch(list(captions))]
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        width = max(map(len, rows))
        token_ids = torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows], device=self.device)
        positions = torch.arange(width, device=self.device).expand(len(rows), width)
        document_ids = torch.where(positions <= last[:, None], 0, -1)
        numbers = torch.arange(len(rows), device=self.device)
        return self.network.text_features(token_ids, document_ids, positions, numbers, last)

    def cosines(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """(N,) cosine of each uint8 RGB picture (N, 3, H, H) and its caption."""
        if len(images) != len(captions):
            raise ValueError(f"Reference: got {len(images)} pictures and {len(captions)} captions, expected as many")
        return F.cosine_similarity(self.features(images), self.text_features(captions), dim=-1)
