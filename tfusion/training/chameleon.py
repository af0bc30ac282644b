"""`ChameleonModule`: next-id prediction over text and images, Transfusion's rival on the same data and trainer.

The loss is one mean over all labelled ids of the whole optimizer step, of text and of images alike, and a z-loss.

Legend: N labelled text positions, I image slots, P ids an image, V ids of text, K of images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfusion.generation import Generator
from tfusion.image_tokens import check_settings
from tfusion.models.chameleon import Chameleon
from tfusion.models.flops import training_flops
from tfusion.requests import GenerationConfig
from tfusion.sequence import IGNORE_INDEX, Batch
from tfusion.tokenizers import ImageTokenizer
from tfusion.training.multimodal import MultimodalModule
from tfusion.training.step_sums import row_metrics, row_sums
from tfusion.training.warm_start import InitFrom


class ChameleonModule(MultimodalModule):
    """Train a Chameleon.

    Args:
        model: the transformer over ids.
        image_tokenizer: pixels <-> ids, frozen: a `VQTokenizer`. None only where the data has no images.
        z_loss_weight: of the mean log^2 Z (Chameleon: 1e-5); 0 = off.
        lr: highest learning rate (Transfusion's paper, of Chameleon: 1e-4).
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of matrices.
        warmup_steps: steps of linear warm-up.
        final_lr_share: the learning rate's share that is left at the last step.
        ema: keep an average of the weights for evaluation.
        generation: default settings for samples and predictions.
        seed: of the initial weights.
        init_from: another run, whose weights a fresh `fit` starts from; None = from random weights.
        compile_blocks: compile the trunk's blocks in `fit`, and in `predict` of many samples: faster, after a minute
            of compiling at most.

    Raises:
        ValueError: an image tokenizer that gives no ids, or ids of another number than the model's codebook_size.
    """

    image_measure = "image_nll"

    def __init__(
        self,
        model: Chameleon,
        image_tokenizer: ImageTokenizer | None = None,
        z_loss_weight: float = 1e-5,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        warmup_steps: int = 4000,
        final_lr_share: float = 0.05,
        ema: bool = True,
        generation: GenerationConfig | None = None,
        seed: int = 0,
        init_from: InitFrom | None = None,
        compile_blocks: bool = False,
    ) -> None:
        optimizer = (lr, betas, eps, weight_decay, warmup_steps, final_lr_share)
        super().__init__(model, image_tokenizer, *optimizer, ema, generation, seed, init_from, compile_blocks)
        if z_loss_weight < 0:
            raise ValueError(f"got z_loss_weight {z_loss_weight}, expected 1e-5 (Chameleon's), or 0 for none")
        self.z_loss_weight = z_loss_weight
        self.predicts_images = image_tokenizer is not None
        if self.predicts_images:
            check_codebook(model, image_tokenizer, f"the image_tokenizer {type(image_tokenizer).__name__}")
        check_settings(self.generation)

    def check_data(self, data: Any) -> None:
        """Refuse pictures without a tokenizer, ids of another codebook out of a cache, and half-noised images."""
        for corpus in data.image_corpora:
            if not self.predicts_images:
                raise ValueError(
                    f"got the image corpus {corpus.name!r} and no image_tokenizer: give Chameleon the VQTokenizer that "
                    "its codebook_size is of"
                )
            if hasattr(corpus, "codebook_size"):  # of latents or ids out of a cache
                check_codebook(self.model, corpus, f"the corpus {corpus.name!r}")
        limit = data.image_first_noise_limit
        if data.image_corpora and limit not in (0, 1):
            raise ValueError(
                f"got data.image_first_noise_limit {limit}, but Chameleon's images are ids, without noise: set it to 1 "
                "(images before their caption are predicted, too) or 0 (they are given)"
            )

    def architecture(self) -> dict[str, Any]:
        """What weights depend on and their shapes do not show."""
        trunk = self.model.transformer
        return {
            "num_heads": trunk.num_heads,
            "rope_theta": trunk.rotary.theta,
            "norm_order": self.model.norm_order,
            "codebook_size": self.model.codebook_size,
            "latent_shape": list(self.model.latent_shape),
        }

    def training_flops(self, rows: int, positions: int, labels: int, images: int) -> int:
        """See `models/flops.py`."""
        return training_flops(self.model, rows, positions, labels, images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that the step's gradient is that of the global means."""
        nll, image_nll, log_z = self._losses(self.model, batch)
        text, images = self.counts_of_step(batch, batch_idx)
        ids = images * self.model.num_patches
        count = (text + ids).clamp(min=1)
        z_loss = log_z.sum() / count
        loss = (nll.sum() + image_nll.sum()) / count
        if self.z_loss_weight:
            loss = loss + self.z_loss_weight * z_loss
        means = torch.stack([loss, nll.sum() / text.clamp(min=1), image_nll.sum() / ids.clamp(min=1), z_loss])
        return self.add_micro_batch(loss, torch.cat([means.detach(), row_sums(batch)]), batch_idx)

    def _losses(self, model: Chameleon, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """nll of each text label (N,) and each image id (I, P), and log^2 Z of all (N + I P,), 0 where unlabelled."""
        with torch.no_grad(), torch.autocast(batch.token_ids.device.type, enabled=False):
            latents = batch.latents
            if latents is None:
                latents = self.image_tokenizer.encode(batch.images.float() / 127.5 - 1)  # (I, 1, h, w)
            predicted = batch.image_valid & (batch.noise_limits > 0)  # the others are given: no loss
            image_labels = model.ids_of(latents).masked_fill(~predicted[:, None], IGNORE_INDEX)  # (I, P)
        labels = torch.cat([batch.text_labels, image_labels.flatten()])
        nll, log_z = model(batch, latents, labels)  # (N + I P,) each
        text, image = nll.split([len(batch.text_labels), image_labels.numel()])
        return text, image.view(image_labels.shape), log_z

    def metrics_of_step(self, sums: Tensor) -> dict[str, float]:
        """What is logged, from the global sums."""
        loss, text_loss, image_loss, z_loss, *rows = sums.tolist()
        metrics = {"train/loss": loss, "train/text_loss": text_loss}
        metrics |= {"train/image_loss": image_loss} if self.predicts_images else {}
        metrics |= {"train/z_loss": z_loss} if self.z_loss_weight else {}
        return metrics | row_metrics(*rows)

    def loss_weights(self, tokens: float, images: float) -> tuple[float, float]:
        """Those that make the mean over all labelled ids, of text and images, of the two means."""
        ids = images * self.model.num_patches
        return tokens / max(tokens + ids, 1), ids / max(tokens + ids, 1)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Losses of each label, and of each image the mean over its ids, for the metrics callback."""
        nll, image_nll, _ = self._losses(self.evaluation_model, batch)
        return {"nll": nll, "labels": batch.text_labels, "errors": image_nll.mean(1), "valid": batch.image_valid}

    def _generator(self, model: Chameleon) -> Generator:
        return Generator(model, None, self._text_tokenizer(), self.image_tokenizer)


def check_codebook(model: Chameleon, source: Any, name: str) -> None:
    """Raise ValueError unless what gives ids gives as many as the model has."""
    size = getattr(source, "codebook_size", None)
    if size is None:
        raise ValueError(
            f"{name} gives no ids (it has no codebook_size), which Chameleon predicts: give a VQTokenizer, or a cache "
            "that one has made"
        )
    if size != model.codebook_size:
        raise ValueError(
            f"{name} has {size} ids, the model's codebook_size is {model.codebook_size}: set it to {size}, or give the "
            f"autoencoder with {model.codebook_size} codes"
        )
