"""`ReferenceEncoderModule`: train the reference encoder on captioned pictures, through the same data and commands.

Rows hold documents `[BOS] caption [BOI] picture [EOI] [EOS]`; a caption is read at its BOI, where it is complete.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfusion.data.validation import GIVEN_IMAGE
from tfusion.models.reference_encoder import THUMBNAIL, ReferenceEncoder
from tfusion.sequence import Batch
from tfusion.training.base import TrainedModule
from tfusion.training.validation_log import log_validation


class ReferenceEncoderModule(TrainedModule):
    """Contrast each picture with all captions of the step, and each caption with all pictures (CLIP).

    Training pictures are moved, scaled, half of them brought down to half their size and half of them blurred and
    noised, by numbers of their row's own generator. Captions and pictures of the whole step are contrasted: one
    process, no accumulation.

    Args:
        model: the two towers.
        thumbnail_weight: of the mean square error of the thumbnails beside the contrastive loss.
        fault_weight: of the mean square error of the levels of blur and noise.
        lr, betas, eps, weight_decay, warmup_steps, final_lr_share: as `TransfusionModule`'s.
        ema: keep an average of the weights, which is what is exported.
        seed: of the initial weights.
    """

    def __init__(
        self,
        model: ReferenceEncoder,
        thumbnail_weight: float = 1.0,
        fault_weight: float = 5.0,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        final_lr_share: float = 0.0,
        ema: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(model, None, lr, betas, eps, weight_decay, warmup_steps, final_lr_share, ema, seed)
        self.thumbnail_weight, self.fault_weight = thumbnail_weight, fault_weight
        self._step: dict[str, Any] = {}
        self._held_out: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def architecture(self) -> dict[str, Any]:
        """What shapes do not show."""
        return {"text_heads": self.model.transformer.num_heads, "image_size": self.model.image_size}

    def check_data(self, data: Any) -> None:
        """Refuse data without a picture and a whole caption in each document."""
        if data.text_corpora or data.choices:
            raise ValueError(
                "the reference encoder reads captions of pictures alone: leave out text_corpora and choices"
            )
        if data.caption_first < 1 or data.caption_drop > 0:
            raise ValueError(
                f"got data.caption_first {data.caption_first} and data.caption_drop {data.caption_drop}; the reference "
                "encoder reads a caption before its picture: expected 1 and 0"
            )
        for corpus in data.image_corpora:
            if hasattr(corpus, "codebook_size"):  # of latents or ids out of a cache
                raise ValueError(
                    f"the corpus {corpus.name!r} holds latents; the reference encoder sees pictures: give the corpus "
                    "that was encoded"
                )

    def setup(self, stage: str) -> None:
        """Refuse a step in several parts."""
        # every picture is contrasted with every caption of its step, or of the held-out ones: one process has them all
        accumulate, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if (accumulate, ranks) != (1, 1):
            raise ValueError(
                f"got {ranks} processes and accumulate_grad_batches {accumulate}; the reference encoder contrasts all "
                "pairs of a step with each other: expected 1 and 1"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Contrastive loss + weighted mean square errors of thumbnails and of the levels of faults."""
        valid = batch.image_valid
        with torch.no_grad(), torch.autocast(batch.token_ids.device.type, enabled=False):
            images, levels = augment(batch.images.float() / 127.5 - 1, batch.noise)
        pictures, captions = self._features(self.model, batch, images)
        contrastive = contrastive_loss(pictures, captions, self.model.logit_scale, valid)
        small = F.interpolate(images, (THUMBNAIL, THUMBNAIL), mode="area")
        thumbnail = _mean_square(self.model.thumbnails(pictures) - small, valid)
        fault = _mean_square(self.model.faults(pictures) - levels, valid)
        loss = contrastive + self.thumbnail_weight * thumbnail + self.fault_weight * fault
        parts = {"loss": loss, "contrastive": contrastive, "thumbnail": thumbnail, "fault": fault}
        self._step = {name: part.detach() for name, part in parts.items()}
        self._step |= {"images": valid.sum(), "positions": (batch.document_ids >= 0).sum()}
        return loss

    def _features(self, model: ReferenceEncoder, batch: Batch, images: Tensor) -> tuple[Tensor, Tensor]:
        """(I, E) fp32 of pictures and of captions."""
        at_boi = (batch.image_starts - 1).clamp(min=0)
        rows = (batch.token_ids, batch.document_ids, batch.position_ids, batch.image_rows, at_boi)
        return model.image_features(images).float(), model.text_features(*rows).float()

    def step_metrics(self) -> dict[str, float]:
        """Of the step that just ended; waits for the device."""
        metrics = {f"train/{name}": float(value) for name, value in self._step.items()}
        metrics |= {
            "train/grad_norm": float(self.grad_norm),
            "train/logit_scale": float(self.model.logit_scale.detach()),
        }
        metrics["train/lr"] = self.optimizers().param_groups[0]["lr"]
        return metrics

    def on_validation_epoch_start(self) -> None:
        self._held_out = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the vectors of held-out pairs; a view with the picture first has no caption to read."""
        view = self.trainer.datamodule.val_views[dataloader_idx]
        if view.endswith(GIVEN_IMAGE):
            return
        pictures, captions = self._features(self.evaluation_model, batch, batch.images.float() / 127.5 - 1)
        kept = batch.image_valid
        self._held_out.setdefault(view, []).append((pictures[kept], captions[kept]))

    def on_validation_epoch_end(self) -> None:
        """`val/<corpus>/retrieval_text` (the right caption of all, for a picture), `retrieval_image`, `val/loss`."""
        metrics, losses = {}, []
        for corpus, pairs in self._held_out.items():
            pictures, captions = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            for name, found in zip(("text", "image"), retrieval(pictures, captions), strict=True):
                metrics[f"val/{corpus}/retrieval_{name}"] = found
            everyone = torch.ones(len(pictures), dtype=torch.bool, device=pictures.device)
            losses.append(float(contrastive_loss(pictures, captions, self.model.logit_scale, everyone)))
        metrics["val/loss"] = sum(losses) / max(len(losses), 1)
        log_validation(self.trainer, self, metrics)


def contrastive_loss(pictures: Tensor, captions: Tensor, logit_scale: Tensor, valid: Tensor) -> Tensor:
    """Mean cross-entropy of (I, E) pictures among captions and back, of the pairs that are `valid` (I,) bool."""
    scale = logit_scale.exp().clamp(max=100)  # CLIP's bound
    logits = scale * F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T  # (I, I)
    logits = logits.masked_fill(~valid, -1e4)  # nobody's captions
    own = torch.arange(len(logits), device=logits.device)
    backwards = logits.T.masked_fill(~valid, -1e4)
    losses = F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(backwards, own, reduction="none")
    return (losses * valid).sum() / 2 / valid.sum().clamp(min=1)


def retrieval(pictures: Tensor, captions: Tensor) -> tuple[float, float]:
    """Share of (I, E) pictures whose own caption is the nearest of all, and of captions whose own picture is."""
    cosines = F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T
    own = torch.arange(len(cosines), device=cosines.device)
    return tuple(float((cosines.argmax(axis) == own).float().mean()) for axis in (1, 0))  # type: ignore[return-value]


def augment(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures moved by up to 6 % and scaled by up to 10 %, half of them at half size, half of them blurred and noised.

    Args:
        images: (I, 3, H, H) in [-1, 1].
        noise: (I, 3, H, H) standard normal.

    Returns:
        The same shape, and (I, 2) levels u of blur and noise in [0, 1], 0 where there is none: sigma = 2 u^2 pixels of
        H = 64, std = 0.4 u^2.
    """
    draws = torch.special.ndtr(noise.flatten(1)[:, :7])  # uniform
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 0.9 + 0.2 * draws[:, 0]
    theta[:, :, 2] = 0.12 * (2 * draws[:, 1:3] - 1)  # the grid goes from -1 to 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    levels = draws[:, 5:7] * (draws[:, 4:5] < 0.5)
    blurred = _blur(moved, 2 * levels[:, 0].square())
    std = 0.4 * levels[:, 1].square()[:, None, None, None]
    size = images.shape[-1]
    half = F.interpolate(blurred, (size // 2, size // 2), mode="area") + std * noise[:, :, ::2, ::2]
    half = F.interpolate(half.clamp(-1, 1), (size, size), mode="bicubic", align_corners=False)
    full = blurred + std * noise
    return torch.where((draws[:, 3] < 0.5)[:, None, None, None], half, full).clamp(-1, 1), levels


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Each of (I, 3, H, H) by a Gaussian of its own (I,) sigma, pixels; at most 2."""
    reach = 6
    distance = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-0.5 * (distance / sigma.clamp(min=0.05)[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)[:, None]  # (3 I, 1, 13)
    x = F.pad(images, (reach, reach, reach, reach), mode="replicate").flatten(0, 1)[None]  # (1, 3 I, H + 12, H + 12)
    x = F.conv2d(x, kernel[:, :, :, None], groups=len(kernel))
    return F.conv2d(x, kernel[:, :, None, :], groups=len(kernel))[0].unflatten(0, images.shape[:2])


def _mean_square(errors: Tensor, valid: Tensor) -> Tensor:
    """Mean over valid pictures of (I, ...) errors squared."""
    each = errors.float().square().flatten(1).mean(1)
    return (each * valid).sum() / valid.sum().clamp(min=1)
