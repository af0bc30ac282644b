"""How well an image autoencoder gives pictures back: PSNR and SSIM, the limit of what a model on its latents can do."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

MOST_PSNR = 100.0  # dB; of a picture given back exactly it would be infinite, and so would be the mean


class Reconstruction(Metric):
    """Means over pictures of PSNR in dB, at most 100, and of SSIM (Wang et al. 2004; window of 11, sigma 1.5).

    `compute` gives `psnr`, `ssim`, `images`, and `psnr_squares`, `ssim_squares`, which `standard_error_of_mean` wants.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("sums", "squares"):  # of psnr and ssim
            self.add_state(name, torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reconstructed: Tensor, pictures: Tensor) -> None:
        """Add (n, 3, H, W) in [0, 1], both; H and W are at least 6, half of SSIM's window."""
        if len(pictures) == 0:
            return
        psnr = peak_signal_noise_ratio(reconstructed, pictures, 1.0, reduction="none", dim=(1, 2, 3))
        # SSIM's variances are small differences of large sums, of which bf16 leaves noise
        with torch.autocast(pictures.device.type, enabled=False):
            ssim = structural_similarity_index_measure(reconstructed, pictures, reduction="none", data_range=1.0)
        values = torch.stack([psnr.clamp(max=MOST_PSNR), ssim.view(-1)]).double()  # (2, n)
        self.sums += values.sum(1)
        self.squares += values.square().sum(1)
        self.images += len(pictures)

    def compute(self) -> dict[str, float]:
        images = self.images.item()
        found = {"images": images}
        for name, total, squares in zip(("psnr", "ssim"), self.sums.tolist(), self.squares.tolist(), strict=True):
            found |= {name: total / max(images, 1), f"{name}_squares": squares}
        return found
