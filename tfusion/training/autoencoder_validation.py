"""What a validation says of an autoencoder: how well pictures come back, what its latents are like, and a sheet.

Legend: n pictures, S their side, C channels, N codes, D features a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image as PILImage
from torch import Tensor

from tfusion.metrics import ImageDistances, ImageFeatures, Reconstruction
from tfusion.metrics.distances import measurements_of
from tfusion.models.autoencoder import Autoencoder, Coded, VQAutoencoder
from tfusion.training.codebook import statistics, use_of

SHOWN = 12  # pictures of a corpus on the sheet
CELL_PX, GAP_PX = 96, 4


class AutoencoderValidation:
    """One validation of all corpora; `compute` is collective.

    Args:
        model: the evaluated one.
        corpora: names.
        network: of the Frechet distance of reconstructions to originals.
        device: where it is.
    """

    def __init__(
        self, model: Autoencoder, corpora: Sequence[str], network: ImageFeatures, device: torch.device
    ) -> None:
        self.model, self.network, self.device = model, network, device
        self.reconstruction = {corpus: Reconstruction().to(device) for corpus in corpora}
        self.distances = {corpus: ImageDistances(network.num_features).to(device) for corpus in corpora}
        for distance in self.distances.values():  # a rank may get no picture
            for real in (True, False):
                distance.update(torch.empty(0, network.num_features, device=device), real)
        self.losses: dict[str, dict[str, Tensor]] = {corpus: {} for corpus in corpora}  # sums and their number
        self.shown: dict[str, list[Tensor]] = {corpus: [] for corpus in corpora}  # (2, 3, S, S) uint8
        self.moments = torch.zeros(3, model.latent_channels, dtype=torch.float64, device=device)  # 1, z, z^2
        vq = isinstance(model, VQAutoencoder)
        self.use = torch.zeros(model.codebook_size if vq else 0, dtype=torch.int64, device=device)

    def update(
        self,
        corpus: str,
        originals: Tensor,
        reconstructed: Tensor,
        parts: dict[str, Tensor],
        coded: Coded,
        valid: Tensor,
    ) -> None:
        """Add a batch.

        Args:
            corpus: whose.
            originals: uint8 (I, 3, S, S).
            reconstructed: (I, 3, S, S), about [-1, 1].
            parts: losses (I,) by name.
            coded: their latents.
            valid: (I,) which slots hold a picture.
        """
        sums = self.losses[corpus]
        for name, each in {**parts, "n": torch.ones_like(valid, dtype=torch.float32)}.items():
            sums[name] = sums.get(name, 0) + (each * valid).sum().double()
        if self.use.numel():
            self.use += use_of(coded, valid, len(self.use))
        z = coded.means[valid].double().movedim(1, 0).flatten(1)  # (C, n h w)
        self.moments += torch.stack([torch.ones_like(z).sum(1), z.sum(1), z.square().sum(1)])
        before, after = originals[valid], ((reconstructed[valid].clamp(-1, 1) + 1) / 2)
        if not len(before):
            return
        self.reconstruction[corpus].update(after, before.float() / 255)
        after = (after * 255).round().to(torch.uint8)
        self.distances[corpus].update(self.network.features(before), real=True)
        self.distances[corpus].update(self.network.features(after), real=False)
        room = SHOWN - len(self.shown[corpus])
        self.shown[corpus] += [pair.cpu() for pair in torch.stack([before, after], 1)[:room]]

    def compute(self, weights: dict[str, float]) -> dict[str, float]:
        """`val/<corpus>/psnr`, `ssim`, `fd_reference` and losses, `val/loss`, and of latents `val/...`.

        Args:
            weights: of the parts of `val/loss`, by name.
        """
        metrics, losses = {}, []
        for corpus, sums in self.losses.items():
            names = list(sums)
            values = _summed(torch.stack([sums[name] for name in names])).tolist()
            values = dict(zip(names, values, strict=True))
            n = values.pop("n")
            means = {name: value / max(n, 1) for name, value in values.items()}
            metrics |= {f"val/{corpus}/{name}": value for name, value in means.items()}
            losses.append(sum(weights[name] * value for name, value in means.items()))
            found = self.reconstruction[corpus].compute()
            metrics |= {f"val/{corpus}/{name}": found[name] for name in ("psnr", "ssim")}
            if found["images"] >= 2:  # of fewer there is no distance
                frechet = measurements_of(self.distances[corpus], self.network, f"val/{corpus}/")[0]
                metrics[frechet.name] = frechet.value
        metrics["val/loss"] = sum(losses) / max(len(losses), 1)
        if self.use.numel():
            self.use = _summed(self.use)
            return metrics | {f"val/{name}": value for name, value in statistics(self.use).items()}
        self.moments = _summed(self.moments)
        for name, each in zip(("mean", "std"), self.latent_statistics(), strict=True):
            metrics |= {f"val/latents_{name}_{channel}": value for channel, value in enumerate(each)}
        return metrics

    def latent_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel (C,) of the posterior's means, once summed over ranks."""
        count, total, squares = self.moments
        mean = total / count.clamp(min=1)
        variance = squares / count.clamp(min=1) - mean.square()
        return mean.tolist(), variance.clamp(min=1e-12).sqrt().tolist()

    def write_sheet(self, path: Path) -> None:
        """The first pictures of each corpus above what came back; whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        sheet([torch.stack(pairs) for pairs in self.shown.values() if pairs]).save(temporary, format="PNG")
        temporary.replace(path)


def sheet(corpora: Sequence[Tensor]) -> PILImage.Image:
    """For each corpus of pairs uint8 (n, 2, 3, S, S) a row of first ones and one of seconds beneath it."""
    scale = max(1, CELL_PX // max((pairs.shape[-1] for pairs in corpora), default=1))
    cell = scale * max((pairs.shape[-1] for pairs in corpora), default=1) + GAP_PX
    columns = max((len(pairs) for pairs in corpora), default=0)
    rows = 2 * len(corpora)
    canvas = np.full((rows * cell + GAP_PX, columns * cell + GAP_PX, 3), 255, np.uint8)
    for c, pairs in enumerate(corpora):
        for column, pair in enumerate(pairs.permute(0, 1, 3, 4, 2).numpy()):
            for row, picture in enumerate(pair):
                large = picture.repeat(scale, 0).repeat(scale, 1)
                y, x = (2 * c + row) * cell + GAP_PX, column * cell + GAP_PX
                canvas[y : y + len(large), x : x + len(large)] = large
    return PILImage.fromarray(canvas)


def _summed(own: Tensor) -> Tensor:
    """Over ranks; collective."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(own)
    return own
