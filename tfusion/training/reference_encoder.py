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


class ReferenceEncoderModule(TrainedModule):
    """Contrast each picture with all captions of the step, and each caption with all pictures (CLIP).

    Training pictures are moved, scaled and half of them brought down to half their size, by numbers of their row's
    own generator. Captions and pictures of the whole step are contrasted: one process, no accumulation.

    Args:
        model: the two towers.
        thumbnail_weight: of the mean square error of the thumbnails beside the contrastive loss.
        lr, betas, eps, weight_decay, warmup_steps, final_lr_share: as `TransfusionModule`'s.
        ema: keep an average of the weights, which is what is exported.
        seed: of the initial weights.
    """

    def __init__(
        self,
        model: ReferenceEncoder,
        thumbnail_weight: float = 1.0,
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
        self.thumbnail_weight = thumbnail_weight
        self._step: dict[str, Any] = {}
        self._held_out: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def architecture(self) -> dict[str, Any]:
        """What shapes do not show."""
        return {"text_heads": self.model.transformer.num_heads, "image_size": self.model.image_size}

    def on_train_start(self) -> None:
        """Every picture is contrasted with every caption of its step, so that one micro-batch holds them all."""
        super().on_train_start()
        accumulate, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if (accumulate, ranks) != (1, 1):
            raise ValueError(
                f"got {ranks} processes and accumulate_grad_batches {accumulate}; the reference encoder contrasts all "
                "pairs of a step with each other: expected 1 and 1"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Contrastive loss + weight x thumbnails' mean square error."""
        valid = batch.image_valid
        with torch.no_grad(), torch.autocast(batch.token_ids.device.type, enabled=False):
            images = augment(batch.images.float() / 127.5 - 1, batch.noise)
        pictures, captions = self._features(self.model, batch, images)
        contrastive = contrastive_loss(pictures, captions, self.model.logit_scale, valid)
        small = F.interpolate(images, (THUMBNAIL, THUMBNAIL), mode="area")
        errors = (self.model.thumbnails(pictures).float() - small).square().flatten(1).mean(1)  # (I,)
        thumbnail = (errors * valid).sum() / valid.sum().clamp(min=1)
        loss = contrastive + self.thumbnail_weight * thumbnail
        self._step = {"loss": loss.detach(), "contrastive": contrastive.detach(), "thumbnail": thumbnail.detach()}
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
        self.log_dict(metrics, logger=False, sync_dist=False)
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, self.trainer.global_step)


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


def augment(images: Tensor, noise: Tensor) -> Tensor:
    """(I, 3, H, H) moved by up to 6 % and scaled by up to 10 %, half of them brought to half size and back.

    Args:
        images: in [-1, 1].
        noise: (I, ...) standard normal, of which 4 numbers a picture are used.
    """
    draws = torch.special.ndtr(noise.flatten(1)[:, :4])  # uniform
    scale = 0.9 + 0.2 * draws[:, 0]
    move = 0.12 * (2 * draws[:, 1:3] - 1)  # the grid goes from -1 to 1
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = move
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    size = images.shape[-1]
    half = F.interpolate(moved, (size // 2, size // 2), mode="area")
    half = F.interpolate(half, (size, size), mode="bicubic", align_corners=False).clamp(-1, 1)
    return torch.where((draws[:, 3] < 0.5)[:, None, None, None], half, moved)
