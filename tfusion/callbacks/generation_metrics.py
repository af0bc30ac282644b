"""`GenerationMetrics`: what the model makes, measured during validation: pictures, captions, scenes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch

from tfusion.callbacks.caption_metrics import measure_captions, measure_scenes
from tfusion.callbacks.picture_metrics import PictureMetrics
from tfusion.data.corpora import CaptionedImage, ImageCorpus, Split
from tfusion.data.sources import captions_of, has_pixels
from tfusion.metrics import ImageFeatures, PairScore
from tfusion.metrics.measurement import Findings
from tfusion.requests import GenerationConfig, Request
from tfusion.training.validation_log import log_validation

log = logging.getLogger(__name__)


class GenerationMetrics(pl.Callback):
    """Measure what the evaluation weights make of each image corpus.

    Pictures made from captions, by each network: `val/<corpus>/fid` and `kid` (Inception), `fd_<name>` and
    `kd_<name>` (another network), against all pictures of the split; `clip_score` (Clip), `clip_score_reference`
    (Reference). A Frechet distance of no more pictures than the network has features is far too large, more so the
    fewer there are: its name ends in `_biased`; kernel distances are not. Captions written for pictures: `cider_d`,
    `caption_exact`; of `shapes` also `caption_accuracy`, and `composition/<kind>/{seen,unseen}` of pictures made from
    fixed prompts.

    Sample i has the first caption of picture i (mod their number), seed i and the module's generation settings, on
    whichever rank it is made. Measured are, in fit, the first validation at or after each multiple of
    `every_n_steps`; in validate, always. Reference pictures' features are computed once and kept in the cache folder.

    Args:
        networks: what to measure pictures with; none = no pictures are made for them.
        num_images: pictures a corpus (clean-fid, and most papers: 50000 or all of a validation set).
        num_captions: captions a corpus, greedy; 0 = none.
        num_scenes: prompts of each kind, seen and unseen, where the corpus is `shapes`; 0 = none.
        num_inference_steps: evaluations a picture; None = the module's.
        every_n_steps: optimizer steps between measurements; 1 = at every validation, as `best.monitor` wants it.
        batch_size: pictures or captions generated, and measured, together on a rank.
        split: whose captions and pictures; `train` for a model that is to remember, its metrics then begin with
            `train/`.
        reference: a file of reference features (`python -m tfusion.bench.folder --write`) instead of the split's
            pictures.
    """

    def __init__(
        self,
        networks: list[ImageFeatures | PairScore] | None = None,
        num_images: int = 1000,
        num_captions: int = 0,
        num_scenes: int = 0,
        num_inference_steps: int | None = None,
        every_n_steps: int = 1,
        batch_size: int = 64,
        split: Split = "val",
        reference: str | None = None,
    ) -> None:
        least = {"num_images": (num_images, 2), "num_captions": (num_captions, 0), "num_scenes": (num_scenes, 0)}
        least |= {"every_n_steps": (every_n_steps, 1), "batch_size": (batch_size, 1)}
        least |= {"num_inference_steps": (1 if num_inference_steps is None else num_inference_steps, 1)}
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise ValueError(f"generation_metrics.{name} is {value}, expected at least {smallest}")
        self.networks = networks or []
        names = [
            getattr(network, key)
            for key in ("name", "score_name")
            for network in self.networks
            if hasattr(network, key)
        ]
        if len(set(names)) < len(names):
            raise ValueError(f"generation_metrics.networks: got the metrics {names}, expected each name once")
        if reference is not None and not Path(reference).is_file():
            raise ValueError(
                f"generation_metrics.reference is {reference!r}, which is no file (looked in {Path.cwd()})"
            )
        if reference is not None and not any(hasattr(network, "features") for network in self.networks):
            raise ValueError(
                f"generation_metrics.reference is {reference!r}, but no network in generation_metrics.networks has "
                "features to compare with it: add the one that it was written with, or leave it out"
            )
        self.num_images, self.num_captions, self.num_scenes = num_images, num_captions, num_scenes
        self.num_inference_steps, self.every_n_steps, self.batch_size = num_inference_steps, every_n_steps, batch_size
        self.split, self.reference = split, reference
        self.findings = Findings()
        self._pictures = PictureMetrics(self.networks, batch_size, reference)
        self._last_step = 0

    @property
    def _active(self) -> bool:
        return bool(self.networks or self.num_captions or self.num_scenes)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the networks: one that cannot be loaded stops the run before it has cost anything."""
        self._pictures = PictureMetrics(self.networks, self.batch_size, self.reference)  # of other data, perhaps
        if not self._active or stage not in ("fit", "validate"):
            return
        corpora = getattr(trainer.datamodule, "image_corpora", None) or []
        self._check_corpora(corpora, pl_module)
        for network in self.networks:
            network.load(trainer.strategy.root_device)
        measures = stage == "validate" or not 0 <= trainer.max_steps < self.every_n_steps
        if trainer.is_global_zero and not measures:
            log.info(
                "generation metrics: none in this fit, every_n_steps %d is past trainer.max_steps %d",
                *(self.every_n_steps, trainer.max_steps),
            )
        for corpus in corpora:
            pictures = self._split_of(trainer, corpus)
            self._check_pixels(corpus.name, pictures)
            self._check_numbers(trainer.is_global_zero and measures, corpus.name, len(pictures))
            # what could not be asked for or compared is refused now, by every rank
            first = Request((captions_of(pictures, 0)[0],), "image", config=self._config(pl_module))
            try:
                pl_module.check_requests([first])
            except ValueError as error:
                raise ValueError(f"generation_metrics would ask for a picture that cannot be made: {error}") from error
            self._pictures.check_reference(pictures)

    def _check_corpora(self, corpora: Sequence[ImageCorpus], pl_module: pl.LightningModule) -> None:
        """Refuse what these corpora and this module cannot give."""
        if not corpora:
            raise ValueError(
                "generation_metrics are asked for, but there are no captions to make pictures from; "
                "add data.image_corpora, or leave networks, num_captions and num_scenes out"
            )
        if not hasattr(pl_module, "generate"):
            raise ValueError(
                f"generation_metrics are asked for, but {type(pl_module).__name__} generates nothing: "
                "leave networks, num_captions and num_scenes out"
            )
        if self.num_captions and not pl_module.predicts_text:
            raise ValueError("generation_metrics.num_captions is set, but the model predicts no text: leave it out")
        if self.num_scenes and not any(getattr(corpus, "scenes", False) for corpus in corpora):
            raise ValueError(
                "generation_metrics.num_scenes is set, but no corpus is tfusion.data.Shapes, whose scenes alone can be "
                "read from pixels: leave it out"
            )
        if self.reference is not None and len(corpora) > 1:
            raise ValueError(
                f"got generation_metrics.reference, one file, for the corpora {[corpus.name for corpus in corpora]}; "
                "expected one corpus, or no reference: each is compared with its own pictures then"
            )

    def _config(self, pl_module: pl.LightningModule) -> GenerationConfig:
        steps = self.num_inference_steps or pl_module.generation.num_inference_steps
        return replace(pl_module.generation, num_inference_steps=steps)

    def _split_of(self, trainer: pl.Trainer, corpus: ImageCorpus) -> Sequence[CaptionedImage]:
        return trainer.datamodule.measured_pictures(corpus, self.split)  # type: ignore[attr-defined]

    def _check_pixels(self, corpus: str, pictures: Sequence[CaptionedImage]) -> None:
        """Refuse to compare with, or write captions for, pictures of which the latents alone were kept."""
        compared = self.reference is None and any(hasattr(network, "features") for network in self.networks)
        if (compared or self.num_captions) and not has_pixels(pictures):
            raise ValueError(
                f"generation_metrics need the {self.split} pictures of corpus {corpus!r}, of which the latents alone "
                "were kept: encode it again with --model.init_args.pictures all (or held_out, for val and test)"
            )

    def _check_numbers(self, speaks: bool, corpus: str, pictures: int) -> None:
        """Refuse what has no covariance, and say which distances will be biased."""
        for network in self.networks:
            if not hasattr(network, "features"):
                continue
            if pictures < 2:
                raise ValueError(
                    f"corpus {corpus!r} has {pictures} {self.split} picture, {network.name} needs 2 or more: hold "
                    "out more (a corpus's `val`), or leave the network out"
                )
            if min(self.num_images, pictures) <= network.num_features and speaks and self.reference is None:
                log.warning(
                    "%s/%s/%s is biased, and will be called %s_biased: it is of %d pictures against %d, and the "
                    "network has %d features; it takes more pictures than features, of both, to compare models",
                    *(self.split, corpus, network.name, network.name, self.num_images, pictures, network.num_features),
                )

    def state_dict(self) -> dict[str, int]:
        """A resumed run measures when an unbroken one does."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._last_step = state_dict["last_step"]

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure if it is time; before `best` looks for its metric."""
        if not self._active or trainer.sanity_checking or trainer.fast_dev_run:
            return
        if trainer.state.fn == "fit":
            if trainer.global_step // self.every_n_steps <= self._last_step // self.every_n_steps:
                return
            self._last_step = trainer.global_step
        self.findings = Findings()
        config = self._config(pl_module)
        if trainer.is_global_zero:
            self._announce(trainer.datamodule.image_corpora)  # type: ignore[attr-defined]
        for corpus in trainer.datamodule.image_corpora:  # type: ignore[attr-defined]
            self._measure(trainer, pl_module, corpus, config)
        metrics = {found.name: found.value for found in self.findings.measurements}
        log_validation(trainer, pl_module, metrics)
        if trainer.is_global_zero:
            times = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in self.findings.seconds.items())
            log.info("generation metrics: %s", times)

    def _announce(self, corpora: Sequence[ImageCorpus]) -> None:
        """Say what comes, which may take minutes."""
        asked = {
            "pictures": self.num_images if self.networks else 0,
            "captions": self.num_captions,
            "scenes of each kind": self.num_scenes if any(getattr(c, "scenes", False) for c in corpora) else 0,
        }
        made = ", ".join(f"{number} {what}" for what, number in asked.items() if number)
        log.info("generation metrics: making up to %s a corpus", made)

    def _measure(
        self, trainer: pl.Trainer, module: pl.LightningModule, corpus: ImageCorpus, config: GenerationConfig
    ) -> None:
        """All of one corpus; collective."""
        pictures, prefix = self._split_of(trainer, corpus), f"{self.split}/{corpus.name}"
        scenes = getattr(corpus, "scenes", False)
        parts = []
        if self.networks:
            sizes = (self.num_images, config, self._timed)
            parts.append(self._pictures.measure(trainer, module, prefix, pictures, *sizes))
        if self.num_captions:
            with self._timed(f"{min(self.num_captions, len(pictures))} captions of {prefix}"):
                sizes = (self.num_captions, self.batch_size, scenes)
                parts.append(measure_captions(trainer, module, prefix, pictures, *sizes))
        if self.num_scenes and scenes:
            with self._timed(f"compositions of {prefix}"):
                sizes = (self.num_scenes, self.batch_size, config)
                parts.append(measure_scenes(trainer, module, prefix, *sizes))
        for measurements, examples in parts:
            self.findings.measurements += measurements
            self.findings.examples += examples

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.findings.seconds[what] = self.findings.seconds.get(what, 0.0) + time.monotonic() - start
