"""The command line: `tfusion {fit,validate,predict}`, also `python -m tfusion`.

A LightningCLI in which `trainer.default_root_dir`, the run folder, alone decides where a run's files are, and
config.yaml and the command line alone its settings. What can be refused is refused before any data is read.
Start reading here: `main` -> `TfusionCLI` -> `tfusion/training/transfusion.py`, where the loss is.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from tfusion.callbacks.bad_records import BadRecordReport
from tfusion.callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint, Checkpoint
from tfusion.callbacks.choices import RankedChoice
from tfusion.callbacks.ema import EMA
from tfusion.callbacks.generation_metrics import GenerationMetrics
from tfusion.callbacks.perplexity import Perplexity
from tfusion.callbacks.progress import LossProgressBar
from tfusion.callbacks.reconstruction import ReconstructionQuality
from tfusion.callbacks.report import ValidationReport
from tfusion.callbacks.samples import SampleGrid
from tfusion.callbacks.training_metrics import TrainingMetrics
from tfusion.callbacks.writer import PredictionWriter
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.parser import Parser
from tfusion.training import run_folder
from tfusion.training.base import TrainedModule
from tfusion.training.chameleon import ChameleonModule  # noqa: F401 (so that YAML may name it, as --help does)
from tfusion.training.encoding import CorpusEncoder
from tfusion.training.parallel import check_strategy
from tfusion.training.trainer_settings import TRAINER_DEFAULTS, check_trainer, check_validation_interval, precision_on
from tfusion.training.transfusion import TransfusionModule  # noqa: F401 (so that YAML may name it, as --help does)
from tfusion.training.warm_start import read_checkpoint

RANK_ZERO_S = 10.0  # how long a refusal on another rank waits for rank 0 to say it


class ConfigWriter(SaveConfigCallback):
    """Write the run's config.yaml, the one that `validate`, `predict` and a resume are given."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write all settings, atomically, less the checkpoint: which one is said at each start."""
        config = self.config.clone()
        config.pop("ckpt_path", None)
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        run_folder.write_atomically(root / "config.yaml", self.parser.dump(config, skip_none=False))


class TfusionCLI(LightningCLI):
    """Lightning's CLI with the run folder as its only place and its config.yaml as the truth."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name the three commands, and the arguments of the Trainer's methods that are not the user's."""
        ours = {"model", "datamodule", "weights_only"}
        return {
            "fit": ours | {"train_dataloaders", "val_dataloaders"},
            "validate": ours | {"dataloaders", "verbose"},
            "predict": ours | {"dataloaders", "return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make callbacks argument groups: `--checkpoint.every_n_train_steps 5`, `--ema.decay 0.999`, ..."""
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(Perplexity, "metrics")
        parser.add_lightning_class_args(GenerationMetrics, "generation_metrics")
        parser.add_lightning_class_args(SampleGrid, "samples")
        parser.add_lightning_class_args(PredictionWriter, "writer")
        parser.add_lightning_class_args(ValidationReport, "report")  # after those that measure
        # Before `checkpoint`, so that last.ckpt holds the score of the validation just done.
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would silently prefer the checkpoint's settings to the command line's."""

    def before_instantiate_classes(self) -> None:
        """Settle run folder and checkpoint, and refuse what cannot work, before time is spent."""
        config = self.config[self.subcommand]
        root = _run_folder(config.trainer.default_root_dir)
        config.trainer.default_root_dir = str(root)
        if config.ckpt_path is not None and not _encodes(config.model):
            config.ckpt_path = str(run_folder.find_checkpoint(root, config.ckpt_path))
        self.save_config_callback = None
        if _encodes(config.model):
            if self.subcommand != "predict":
                raise ValueError(f"{self.subcommand} got CorpusEncoder, which trains nothing: run `tfusion predict`")
            if config.ckpt_path is not None:
                raise ValueError(
                    f"got --ckpt_path {config.ckpt_path}, but CorpusEncoder has no weights of its own: leave it out, "
                    "and name the autoencoder in model.init_args.image_tokenizer"
                )
        elif self.subcommand != "fit":
            if config.ckpt_path is None:
                raise ValueError(f"{self.subcommand} got no weights; expected --ckpt_path last, best or a path")
        elif not config.trainer.fast_dev_run:
            check_trainer(config.trainer)
            check_validation_interval(config.trainer)
            if config.ckpt_path is None:
                run_folder.refuse_used_folder(root)
            if config.ckpt_path is None or not (root / "config.yaml").exists():
                self.save_config_callback = ConfigWriter
                self.save_config_kwargs = {"save_to_log_dir": False}

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the Trainer with the run folder's own loggers and checkpoint writer, and lock the folder."""
        config = self.config_init[self.subcommand].trainer
        root = config.default_root_dir
        callbacks = _as_list(config.callbacks)
        kwargs["plugins"] = [*_as_list(config.plugins), AtomicCheckpointIO()]
        kwargs["logger"] = False
        if self.subcommand == "fit":
            own = [run_folder.MetricsLogger(root), run_folder.EventsLogger(root)]
            kwargs["logger"] = own + _as_list(config.logger)
        callbacks += [BadRecordReport(), TrainingMetrics(), RankedChoice(), ReconstructionQuality()]
        if config.accelerator == "auto" and not torch.cuda.is_available():
            kwargs["accelerator"] = "cpu"  # Apple's GPUs have no float64, which sums of losses need
        if config.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"got trainer.accelerator {config.accelerator!r}, but torch finds no CUDA device; on a CPU add "
                "--config configs/trainer/cpu.yaml"
            )
        if "cpu" in (config.accelerator, kwargs.get("accelerator")):
            kwargs["precision"] = precision_on("cpu", config.precision)
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(LossProgressBar())
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        # Only now is the global rank known, on every launcher.
        if trainer.is_global_zero and self.subcommand != "validate" and not config.fast_dev_run:
            run_folder.lock(Path(root))
        return trainer

    def before_fit(self) -> None:
        """Refuse what does not fit together, while there is one process and nothing has been read."""
        self.datamodule.layout_under(self.trainer)
        self._check_model()
        if isinstance(self.model, TrainedModule) and self.model.ckpt_path is None:
            self.model.check_init_from()

    def after_fit(self) -> None:
        """Say where to look, and what comes next."""
        if self.trainer.fast_dev_run:
            return
        root = Path(os.path.relpath(self.trainer.default_root_dir))
        logging.getLogger("tfusion").info(
            "step %d; all of it is in %s; measure it: tfusion validate --config %s --ckpt_path last",
            *(self.trainer.global_step, root, root / "config.yaml"),
        )

    def _check_model(self) -> None:
        """Refuse a model that does not fit the data, the processes or the checkpoint."""
        self.datamodule.check_against(self.model, self.subcommand)
        ckpt_path = self.config_init[self.subcommand].ckpt_path
        check_strategy(self.trainer.strategy, self.trainer.world_size)
        self.model.ckpt_path = ckpt_path
        if ckpt_path and isinstance(self.model, TrainedModule):  # Lightning reads it when the data have been read
            self.model.check_checkpoint(read_checkpoint(Path(ckpt_path)))

    before_validate = before_predict = _check_model

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}
        if subcommand == "validate":
            kwargs["verbose"] = False  # Lightning's table comes once a loader, and cuts names
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # the writer has written them
        return kwargs


def _encodes(model: Any) -> bool:
    """Say whether the model is the encoder of corpora, which needs no checkpoint."""
    return model is not None and model.class_path == f"{CorpusEncoder.__module__}.{CorpusEncoder.__qualname__}"


def _run_folder(default_root_dir: str | os.PathLike[str] | None) -> Path:
    if default_root_dir is None:
        raise ValueError(
            "got no trainer.default_root_dir, expected the run folder, where everything of a run goes; "
            "set it in the YAML or with --trainer.default_root_dir runs/NAME"
        )
    return Path(default_root_dir).expanduser().absolute()


def _as_list(value: Any) -> list[Any]:
    """Take the Trainer's ways to say none or a default (ours replace it), one, or several."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _quieten() -> None:
    """Silence what Lightning says of things that are as we want them; nothing that tfusion says."""
    ignored = [
        r"LightningCLI's args parameter is intended",  # bench.check_data passes its own
        r"The '\w+' does not have many workers",  # packing is light; data.num_workers is the user's choice
        r"Found \d+ module\(s\) in eval mode",  # ema_model, which never trains
        r"The `srun` command is available",  # a single process is a fine way to run
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
        r"`broadcast_buffers` is deprecated",  # torch 2.11 has no other name for it
        r"It is recommended to use `self.log\(.*sync_dist=True",  # what tfusion logs is global already
    ]
    for message in ignored:
        warnings.filterwarnings("ignore", message=message)
    if rank_zero_only.rank != 0:
        warnings.simplefilter("ignore")  # rank 0 says the same
    # Advertisements, the seed of a generator that nothing here reads, hardware that tfusion does not use.
    unwanted = ("Tip: For seamless", "Seed set to", "TPU available")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logger = logging.getLogger(name)
        logger.addFilter(lambda record: not any(text in record.getMessage() for text in unwanted))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those it came up in: Lightning's clean-up after a refusal fails on meta tensors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_for_the_user(error: BaseException) -> bool:
    """Say whether an error is a refusal, worded for the user, or an accident that needs its traceback."""
    if isinstance(error, MisconfigurationException):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = frame.f_globals.get("__package__") or ""
    return isinstance(error, ValueError) and package.split(".")[0] == "tfusion"


def _rank_zero_ends(parent: int) -> bool:
    """Wait a little for rank 0 to say the same, for refusals are alike on all ranks; say whether it has.

    It is this process's parent, and gone then, or has a launcher (torchrun), which ends this process, too.
    """
    deadline_s = time.monotonic() + RANK_ZERO_S
    while os.getppid() == parent and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return os.getppid() != parent


def run(cli: type[TfusionCLI], args: list[str] | None = None) -> TfusionCLI:
    """Run a command line with these arguments (None: the process's own).

    Exits with 2 and one message where the input is refused; TFUSION_TRACEBACK=1 shows the traceback instead.
    """
    parent = os.getppid()
    _quieten()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no GPU is no news, compiled blocks or not
    package = logging.getLogger("tfusion")
    package.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.WARNING)
    if not package.handlers:
        package.addHandler(logging.StreamHandler())
    try:
        return cli(
            pl.LightningModule,
            MultimodalDataModule,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,  # for completeness: training draws from generators of its own
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=Parser,
            parser_kwargs={
                "prog": "tfusion",
                "allow_abbrev": False,  # --trainer.max_step would be taken for max_steps, and a typo for its neighbour
                "description": "Train, validate and sample Transfusion models.",
            },
            args=args,
        )
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)  # Lightning's would say that all went well
    except Exception as error:
        refusals = [cause for cause in _chain(error) if _is_for_the_user(cause)]
        if os.environ.get("TFUSION_TRACEBACK") == "1" or not refusals:
            raise
        if rank_zero_only.rank != 0 and _rank_zero_ends(parent):
            sys.exit(2)
        sys.stderr.write(f"tfusion: error: {refusals[0]}\n(TFUSION_TRACEBACK=1 shows where)\n")
        sys.exit(2)


def main(args: list[str] | None = None) -> None:
    """Run `tfusion`."""
    run(TfusionCLI, args)


if __name__ == "__main__":
    main()
