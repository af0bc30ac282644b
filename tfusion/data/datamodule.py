"""`MultimodalDataModule`: corpora in, packed batches out, and the data's position for an exact resume."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import lightning as L
import torch.distributed as dist
from torch.utils.data import DataLoader

from tfusion.data.bad_records import BadRecords
from tfusion.data.building import (
    Sizes,
    check_some_left,
    check_vocab_size,
    count_bad_records,
    drop_long_captions,
    fit_rows,
    load_texts,
    make_tokenizer,
    mean_length,
    most_images,
)
from tfusion.data.checks import check_settings, check_together, row_for
from tfusion.data.choices import ChoiceDocument, ChoiceRows, choice_documents, read_choices
from tfusion.data.corpora import CaptionedImage, ImageCorpus, Split, TextCorpus
from tfusion.data.mixture import CaptionedDocuments, Mixture
from tfusion.data.prompts import read_prompts
from tfusion.data.sample_requests import requests_of_pictures, requests_of_texts
from tfusion.data.shard_batches import ShardBatches, check_corpora, load_splits
from tfusion.data.sources import Concatenated, has_pixels, load_split
from tfusion.data.steps import MicroBatches, StepDataset, StepLayout
from tfusion.data.text_pieces import TextPieces
from tfusion.data.validation import GIVEN_IMAGE, ValidationRows, caption_documents, text_documents
from tfusion.requests import GenerationConfig, Request, parse_request
from tfusion.sequence import Batch, RowShape
from tfusion.tokenizers.text import TextTokenizer

log = logging.getLogger(__name__)


class MultimodalDataModule(L.LightningDataModule):
    """Interleave corpora of captioned pictures and of text into rows of exactly `seq_len` positions.

    Args:
        image_corpora: captioned pictures, all of one size.
        text_corpora: texts.
        image_weights: how often each image corpus is drawn from, in proportion; None = each as large as it is.
        text_weights: the same for text corpora, in bytes.
        vocab_size: of the tokenizer with the 5 special ids; must be the model's.
        tokenizer_file: a `tokenizer.json`; None = byte-level BPE trained on the corpora.
        seq_len: T, positions a row (paper: 4096).
        rows_per_step: R, rows of one optimizer step over all ranks and micro-batches (paper: 512).
        image_share: target share of positions in image documents (paper: 0.5).
        caption_first: share of image documents with the caption first (paper: 0.8).
        caption_drop: share of those that lose the caption, for guidance (JanusFlow, BAGEL: 0.1).
        image_first_noise_limit: highest noise where the image comes first, as a fraction (paper: 1, or 0.5 in table 8).
        max_images_per_row: K, image slots a row, of which empty ones cost what full ones do; None = half as many again
            as the share of images takes (without text corpora: as many as fit).
        lanes: streams a row; num_workers divides it.
        num_workers: processes that make training batches.
        val_rows: rows a validation batch and rank.
        max_val_images: pictures validated a corpus.
        max_val_characters: of text validated a corpus.
        max_bad_share: share of a corpus's records that may be bad and are left out; more is an error.
        seed: of order, mixture and noise.
        prompts: `prompts.jsonl` for `predict`.
        predict_batch_size: samples decoded, or pictures encoded into a latent cache, together.
        choices: files of ranked choice to validate on, by name; `tfusion.data.choices` says what is in them.
    """

    def __init__(
        self,
        image_corpora: list[ImageCorpus] | None = None,
        text_corpora: list[TextCorpus] | None = None,
        image_weights: list[float] | None = None,
        text_weights: list[float] | None = None,
        vocab_size: int = 4096,
        tokenizer_file: str | None = None,
        seq_len: int = 4096,
        rows_per_step: int = 16,
        image_share: float = 0.5,
        caption_first: float = 0.8,
        caption_drop: float = 0.1,
        image_first_noise_limit: float = 1.0,
        max_images_per_row: int | None = None,
        lanes: int = 8,
        num_workers: int = 0,
        val_rows: int = 16,
        max_val_images: int = 1000,
        max_val_characters: int = 1_000_000,
        max_bad_share: float = 0.01,
        seed: int = 0,
        prompts: str | None = None,
        predict_batch_size: int = 64,
        choices: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.image_corpora, self.text_corpora = image_corpora or [], text_corpora or []
        self.image_weights = None if image_weights is None else tuple(image_weights)
        self.text_weights = None if text_weights is None else tuple(text_weights)
        self.vocab_size, self.tokenizer_file, self.seq_len = vocab_size, tokenizer_file, seq_len
        self.rows_per_step, self.lanes, self.num_workers, self.seed = rows_per_step, lanes, num_workers, seed
        self.image_share, self.caption_first, self.caption_drop = image_share, caption_first, caption_drop
        self.image_first_noise_limit, self.max_images_per_row = image_first_noise_limit, max_images_per_row
        self.val_rows, self.max_val_images, self.max_val_characters = val_rows, max_val_images, max_val_characters
        self.max_bad_share = max_bad_share
        self.prompts, self.predict_batch_size = prompts, predict_batch_size
        self.choices = dict(choices or {})
        check_settings(self)
        self.questions = {name: read_choices(path) for name, path in self.choices.items()}
        self._choice_documents: dict[str, list[ChoiceDocument]] = {}
        self.tokenizer: TextTokenizer | None = None
        self.reads_captions = True  # the module does
        self.mixture: Mixture | None = None
        self.val_shape: RowShape | None = None  # of a validation row
        self.layout: StepLayout | None = None  # of training
        self.bad_records = BadRecords(max_bad_share)
        self._measured_pictures: dict[tuple[str, Split], Concatenated] = {}
        self.val_views: list[str] = []
        self.splits: dict[Split, Sequence[CaptionedImage]] = {}  # while a corpus is encoded
        self.step, self.positions = 0, {}  # of the data: committed when a whole step has been consumed

    def setup(self, stage: str) -> None:
        """Load corpora, tokenizer and prompts; check them against the model, before any time is spent."""
        if stage == "predict":
            self._prepare_predict()
            return
        if stage == "fit":
            self.step, self.positions = 0, {}
            self.layout = self.layout_under(self.trainer)
        module = self.trainer.lightning_module
        if getattr(module, "init_from", None) is not None:  # whose ids a warm start's weights mean is known before them
            module.take_text_tokenizer()
            if self.tokenizer_file is not None:
                raise ValueError(
                    "got data.tokenizer_file and init_from, whose weights come with their own tokenizer: set "
                    "data.tokenizer_file to null"
                )
        self.prepare_mixture(module)
        self.val_views = [
            *(corpus.name for corpus in self.text_corpora),
            *(corpus.name + ending for corpus in self.image_corpora for ending in ("", GIVEN_IMAGE)),
        ]
        for name, questions in self.questions.items():
            self._choice_documents[name], cut = choice_documents(questions, self.tokenizer, self.seq_len)
            if cut and self.trainer.global_rank == 0:
                log.warning(
                    "data.choices %s: the contexts of %d of %d questions are cut at their beginning to fit "
                    "data.seq_len %d",
                    *(name, cut, len(questions), self.seq_len),
                )

    def layout_under(self, trainer: L.Trainer) -> StepLayout:
        """How this trainer divides a step's rows; raises ValueError where it cannot."""
        accumulate, ranks, rank = trainer.accumulate_grad_batches, trainer.world_size, trainer.global_rank
        return StepLayout(self.rows_per_step, self.lanes, accumulate, ranks, rank, self.num_workers)

    def check_against(self, module: Any, stage: str) -> None:
        """Check the settings against a model's, before anything is read: of `fit`, `validate` or `predict`.

        The module is asked first (`check_data(datamodule)`, where it has that), for it knows best what it cannot use.

        Raises:
            ValueError: they do not fit each other.
        """
        encodes = hasattr(module, "own_shards")
        if stage == "predict" and not encodes:
            return  # requests need no corpus, which need not be on this machine
        check_together(self)
        if encodes:
            check_corpora(self.image_corpora, self.text_corpora)
        if hasattr(module, "check_data"):
            module.check_data(self)
        if not encodes:
            row_for(self, module)

    def _prepare_predict(self) -> None:
        if self._encodes:
            corpus = check_corpora(self.image_corpora, self.text_corpora)
            self.bad_records = count_bad_records([corpus], self.max_bad_share)
            self.splits = load_splits(corpus)
            return
        if self.prompts is None:
            raise ValueError("predict needs data.prompts: give --data.prompts prompts.jsonl (README, 'Prompts')")
        defaults = getattr(self.trainer.lightning_module, "generation", None) or GenerationConfig()
        self.requests = read_prompts(self.prompts, defaults)

    @property
    def _encodes(self) -> bool:
        """Whether `predict` encodes a corpus (`CorpusEncoder`) in place of meeting requests."""
        return hasattr(self.trainer.lightning_module, "own_shards")

    def prepare_data(self) -> None:
        """Read corpora of files into the cache, in one process of a machine; the others then map it."""
        self.check_against(self.trainer.lightning_module, self.trainer.state.fn)
        for corpus in self.image_corpora + self.text_corpora:
            if hasattr(corpus, "prepare") and (self.trainer.state.fn != "predict" or self._encodes):
                corpus.prepare()

    def prepare_mixture(self, module: Sizes) -> None:
        """Load the training data and check it against a model, before any time is spent."""
        self.check_against(module, "fit")
        shape = self.val_shape = row_for(self, module)
        self._measured_pictures = {}
        self.bad_records = count_bad_records(self.image_corpora + self.text_corpora, self.max_bad_share)
        texts = load_texts(self.text_corpora)
        pictures = Concatenated([load_split(corpus, "train") for corpus in self.image_corpora])
        # of weights that have been loaded, or made here
        self.reads_captions = getattr(module, "reads_captions", True)
        of_tokenizer = (self.tokenizer_file, texts, pictures if self.reads_captions else [], self.vocab_size)
        self.tokenizer = module.text_tokenizer or make_tokenizer(*of_tokenizer)
        check_vocab_size(self.tokenizer, module.model_vocab_size)
        share, images = self.image_share if texts else 1.0, None
        if self.image_corpora:
            order = (self.caption_first, self.caption_drop) if self.reads_captions else (1.0, 1.0)  # first, and dropped
            if self.reads_captions:
                pictures = drop_long_captions(pictures, self.tokenizer, shape, self.bad_records)
                given = self.max_images_per_row is not None
                check_some_left(self.image_corpora, pictures, shape, self.bad_records)
                mean = mean_length(pictures, self.tokenizer, shape, self.image_weights)
                shape, self.val_shape = fit_rows(shape, mean, share, not texts, given)
            chances = (*order, self.image_first_noise_limit)
            images = CaptionedDocuments(pictures, self.tokenizer, self.seed, *chances, self.image_weights)
        piece_bytes = max(2048, 4 * self.seq_len)
        pieces = TextPieces(texts, self.tokenizer, piece_bytes, self.text_weights) if texts else None
        self.mixture = Mixture(pieces, images, shape, share, self.seed, self.lanes * self.rows_per_step)

    def train_dataloader(self) -> MicroBatches:
        """Micro-batches from the committed position on."""
        dataset = StepDataset(self.mixture, self.layout, self.seed, self.step, dict(self.positions))
        ahead = max(1, 4 // self.layout.micro_batches)  # steps a worker, each whole
        options: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": ahead} if self.num_workers else {}
        pinned = self.trainer.strategy.root_device.type == "cuda"
        return MicroBatches(
            DataLoader(dataset, batch_size=None, num_workers=self.num_workers, pin_memory=pinned, **options)
        )

    def val_dataloader(self) -> list[DataLoader]:
        """One loader a view, in the order of `val_views`, then one a file of ranked choice, in that of `questions`."""
        tokenizer, shape = self.tokenizer, self.val_shape
        most = self.max_val_characters
        documents = [text_documents(load_split(corpus, "val"), tokenizer, most) for corpus in self.text_corpora]
        for corpus in self.image_corpora:
            pictures = self.validation_pictures(corpus)
            for image_first in (False, True):
                of_captions = tokenizer if self.reads_captions else None
                documents.append(caption_documents(pictures, of_captions, image_first, self.max_val_images))
        layout = (shape, self.seed, self.trainer.global_rank, self.trainer.world_size, self.val_rows)
        views = [ValidationRows(view, some, *layout) for view, some in zip(self.val_views, documents, strict=True)]
        views += [ChoiceRows(name, iter(some), *layout) for name, some in self._choice_documents.items()]
        return [DataLoader(rows, batch_size=self.val_rows, collate_fn=rows.collate) for rows in views]

    def validation_pictures(self, corpus: ImageCorpus) -> Sequence[CaptionedImage]:
        """The held-out pictures of a corpus, less those whose captions fit no row."""
        return self.measured_pictures(corpus, "val")

    def measured_pictures(self, corpus: ImageCorpus, split: Split) -> Sequence[CaptionedImage]:
        """The pictures of a split that generated ones are measured against, less those whose captions fit no row."""
        if (corpus.name, split) not in self._measured_pictures:
            pictures = Concatenated([load_split(corpus, split)])
            if self.reads_captions:
                allowed = BadRecords(max_share=1.0)  # those of training are limited
                pictures = drop_long_captions(pictures, self.tokenizer, self.mixture.shape, allowed)
            self._measured_pictures[corpus.name, split] = pictures
        return self._measured_pictures[corpus.name, split]

    def predict_dataloader(self) -> DataLoader:
        """Lists of (number, request); rank r has requests r, r + W, ..., and at least one list, if an empty one.

        (Lightning skips a rank without batches, and its part in collectives.) For a `CorpusEncoder`, its pictures.
        """
        if self._encodes:
            shards = self.trainer.lightning_module.own_shards()
            return ShardBatches(self.splits, shards, self.predict_batch_size).loader(self.num_workers)
        requests = list(enumerate(self.requests))[self.trainer.global_rank :: self.trainer.world_size]
        starts = range(0, max(1, len(requests)), self.predict_batch_size)
        batches = [requests[start : start + self.predict_batch_size] for start in starts]
        return DataLoader(batches, batch_size=1, collate_fn=itemgetter(0))  # type: ignore[arg-type]

    def sample_pictures(self) -> Sequence[CaptionedImage]:
        """Pictures to caption during training: those of training, or held-out ones where these are latents alone."""
        pictures = self.mixture.images.pictures if self.image_corpora else []
        if has_pixels(pictures):
            return pictures
        return Concatenated([self.validation_pictures(corpus) for corpus in self.image_corpora])

    def sample_requests(self, num_images: int, num_captions: int, num_texts: int) -> list[Request]:
        """Fixed requests to look at during training, from the first pictures and held-out text.

        The pictures are those of training; where these are latents alone and some are to be captioned, held-out ones.
        """
        module = self.trainer.lightning_module
        images = self.mixture.images
        pictures = self.sample_pictures() if num_captions or images is None else images.pictures
        requests = requests_of_pictures(pictures, num_images, num_captions if module.predicts_text else 0)
        if module.predicts_text:
            requests += requests_of_texts(self.text_corpora, num_texts, max(31, self.seq_len // 4))
        return [parse_request(request, module.generation) for request in requests]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Batches move, requests stay as they are (Lightning would try to rebuild the frozen dataclass)."""
        return batch.to(device, non_blocking=True) if isinstance(batch, Batch) else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Commit the position that a consumed (not a prefetched) micro-batch carries."""
        if isinstance(batch, Batch) and batch.position is not None and self.trainer.training:
            self.step, after = batch.position
            self.positions.update(after)
            batch.position = None
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position of all streams, gathered over ranks; collective."""
        positions = dict(self.positions)
        if dist.is_available() and dist.is_initialized():
            tables: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(tables, positions)
            for table in tables:  # a stream's owner is the one that has emitted most of its rows
                for stream, position in table.items():
                    positions[stream] = max(positions.get(stream, position), position)
        return {"step": self.step, "positions": positions, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's position, on any layout of the same rows.

        Raises:
            ValueError: the data or the rows a step are not those of the checkpoint.
        """
        if self.layout is None:
            self.tokenizer = self.trainer.lightning_module.text_tokenizer  # ids mean what the weights have learned
            return  # validate and predict read no training data
        shape = self.mixture.shape
        older = {"max_images_per_row": most_images(shape.seq_len, shape.num_patches) if shape.max_images else 0}
        for name, here in self._identity().items():
            there = state.get(name, older.get(name))
            if there != here:
                raise ValueError(
                    f"the checkpoint was trained with {name} {there!r}, this run has {here!r}: an exact resume "
                    "needs the same data, seed and rows; set them back, or start a new run in another folder"
                )
        self.step, self.positions = state["step"], dict(state["positions"])

    def _identity(self) -> dict[str, Any]:
        """What the position means anything for."""
        mixture = self.mixture
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "rows_per_step": self.rows_per_step,
            "lanes": self.lanes,
            "image_share": self.image_share,
            "max_images_per_row": mixture.shape.max_images if mixture else 0,
            "num_texts": len(mixture.texts) if mixture and mixture.texts else 0,
            "num_pictures": len(mixture.images.pictures) if mixture and mixture.images else 0,
            "weights": [self.image_weights, self.text_weights],
            "content": [getattr(part, "content", "") for part in self._parts()],
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else "",
        }

    def _parts(self) -> list[Any]:
        """The training split of each corpus."""
        texts, images = (self.mixture.texts, self.mixture.images) if self.mixture else (None, None)
        return (images.pictures.parts if images else []) + (texts.corpora if texts else [])
