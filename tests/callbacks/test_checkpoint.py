"""A run killed at any moment and resumed equals, to the last bit, the run that was never killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from tfusion.callbacks.checkpoint import AtomicCheckpointIO, BestCheckpoint, Checkpoint, _link
from tfusion.callbacks.ema import EMA
from tfusion.training.run_folder import MetricsLogger

STEPS, VALIDATE_EVERY, SAVE_EVERY = 12, 4, 3


class Toy(pl.LightningModule):
    """A linear regression with an average of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.ema_model = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
        for model in (self.model, self.ema_model):
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, 0.5)
        self.ema_model.requires_grad_(False)
        self.seen: list[int] = []

    def training_step(self, batch, batch_idx):
        number, x = batch
        self.seen.append(number)
        self.train_loss = (self.model(x).squeeze() - x.sum(1)).square().mean()
        return self.train_loss

    def validation_step(self, batch, batch_idx):
        loss = (self.ema_model(batch).squeeze() - batch.sum(1)).square().mean()
        self.log("val/loss", loss, logger=False)

    def on_validation_epoch_end(self):
        for logger in self.trainer.loggers:
            logger.log_metrics({"val/loss": self.trainer.callback_metrics["val/loss"]}, self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=0.05)


class ToyData(pl.LightningDataModule):
    """Endless batches, each a function of its number; the number of the next whole step is the position."""

    def __init__(self) -> None:
        super().__init__()
        self.position = 0

    def train_dataloader(self):
        class Numbers:
            def __iter__(_):
                number = self.position
                while True:
                    yield number, torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
                    number += 1

        return Numbers()

    def val_dataloader(self):
        return DataLoader(torch.eye(3), batch_size=2)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training and (batch[0] + 1) % self.trainer.accumulate_grad_batches == 0:
            self.position = batch[0] + 1
        return batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class TrainLoss(pl.Callback):
    """Log a row a step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not trainer.fit_loop._should_accumulate():
            for logger in trainer.loggers:
                logger.log_metrics({"train/loss": pl_module.train_loss}, trainer.global_step)


class KillAt(pl.Callback):
    """Kill this process at the n-th Python or C function call or return of the training loop."""

    def __init__(self, event: int | None) -> None:
        self.event, self.count = event, 0

    def on_train_start(self, trainer, pl_module):
        def count(frame, what, argument):
            self.count += 1
            if self.count == self.event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)

    def on_fit_end(self, trainer, pl_module):
        sys.setprofile(None)
        Path(trainer.default_root_dir, "events").write_text(str(self.count))


def trainer_of(root: Path, *callbacks: pl.Callback, accumulate: int = 1, max_steps: int = STEPS, **options):
    """A trainer as the command line makes it."""
    return pl.Trainer(
        default_root_dir=root,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        check_val_every_n_epoch=None,
        **{"val_check_interval": VALIDATE_EVERY * accumulate} | options,
        num_sanity_val_steps=0,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=[MetricsLogger(root)],
        plugins=[AtomicCheckpointIO()],
        callbacks=[TrainLoss(), EMA(0.9), *callbacks],
    )


def train(root: Path, kill_at: int | None = None, accumulate: int = 1, resume: bool = False) -> None:
    """Run to the end, or to the kill; in a process of its own."""
    torch.set_num_threads(1)
    last = Path(root, "checkpoints", "last.ckpt")
    trainer = trainer_of(root, BestCheckpoint(), Checkpoint(SAVE_EVERY), KillAt(kill_at), accumulate=accumulate)
    ckpt_path = str(last) if resume and last.exists() else None
    trainer.fit(Toy(), ToyData(), ckpt_path=ckpt_path, weights_only=True)


def in_process(target, *args, **kwargs) -> int | None:
    """Exit code of `target` in a fresh process, quickly: the server has imported the heavy packages."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "tfusion.callbacks.checkpoint"])
    process = context.Process(target=target, args=args, kwargs=kwargs)
    process.start()
    process.join(60)
    return process.exitcode


def assert_same_state(left: object, right: object, where: str = "") -> None:
    """Bitwise, recursively."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same_state(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same_state(one, other, f"{where}.{i}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_anywhere_and_resumed_equals_never_killed(tmp_path: Path, accumulate: int) -> None:
    whole = tmp_path / "whole"
    assert in_process(train, whole, accumulate=accumulate) == 0
    events = int((whole / "events").read_text())
    chosen = random.Random(accumulate).sample(range(events // 8, events), 5)
    resumed = 0
    for number, event in enumerate(chosen):
        killed = tmp_path / f"killed{number}"
        assert in_process(train, killed, kill_at=event, accumulate=accumulate) == -signal.SIGKILL
        last = killed / "checkpoints" / "last.ckpt"
        if last.exists():
            load(last)  # whole, whenever it was killed
            resumed += 1
        assert in_process(train, killed, accumulate=accumulate, resume=True) == 0
        assert (killed / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
        names = [sorted(path.name for path in (root / "checkpoints").iterdir()) for root in (killed, whole)]
        assert names[0] == names[1] == ["best.ckpt", "last.ckpt", "step=0000012.ckpt"]
        for name in ("last.ckpt", "best.ckpt"):
            assert_same_state(load(killed / "checkpoints" / name), load(whole / "checkpoints" / name), name)
    assert resumed >= 2


class KillInSave(AtomicCheckpointIO):
    """Die in the middle of writing the n-th file."""

    def __init__(self, n: int) -> None:
        self.left = n

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.left -= 1
        if not self.left:
            checkpoint = {**checkpoint, "pad": torch.zeros(1 << 16), "killer": _Killer()}
        super().save_checkpoint(checkpoint, path, storage_options)


class _Killer:
    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def train_and_die_in_save(root: Path) -> None:
    trainer = trainer_of(root, Checkpoint(SAVE_EVERY))
    trainer.strategy.checkpoint_io = KillInSave(2)
    trainer.fit(Toy(), ToyData())


def test_killed_while_writing_a_file_leaves_the_one_before(tmp_path: Path) -> None:
    assert in_process(train_and_die_in_save, tmp_path) == -signal.SIGKILL
    folder = tmp_path / "checkpoints"
    assert load(folder / "last.ckpt")["global_step"] == SAVE_EVERY
    assert (folder / ".step=0000006.ckpt.tmp").exists()
    trainer_of(tmp_path, Checkpoint(5)).fit(Toy(), ToyData(), ckpt_path=str(folder / "last.ckpt"))
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step=0000012.ckpt"]


def test_an_exception_while_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):  # a local function cannot be pickled
        AtomicCheckpointIO().save_checkpoint({"bad": lambda: None}, tmp_path / "new" / "a.ckpt")
    assert not list((tmp_path / "new").iterdir())


def test_last_names_a_whole_file_at_every_moment(tmp_path: Path) -> None:
    """An exception at the n-th call inside stands for a kill there."""
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)
    _link(tmp_path / "last.ckpt", "old")
    found = []
    for stop_at in range(1, 1000):
        count = 0

        def stop(frame, event, argument):
            nonlocal count
            count += 1
            if count == stop_at:  # noqa: B023 (called at once)
                raise InterruptedError

        sys.setprofile(stop)
        try:
            _link(tmp_path / "last.ckpt", "new")
            sys.setprofile(None)
        except InterruptedError:
            pass
        found.append((tmp_path / "last.ckpt").read_text())
        if count < stop_at:
            break
    assert found[0] == "old"
    assert found[-1] == "new"
    assert sorted(found, reverse=True) == found  # old up to the rename, new from then on


class Saves(Checkpoint):
    """Note at which optimizer step and after which batch each file is written."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.at: list[tuple[int, int]] = []

    def _write(self, trainer, name):
        self.at.append((trainer.global_step, trainer.lightning_module.seen[-1]))
        super()._write(trainer, name)


def test_saves_whole_steps_only_also_right_after_a_resume(tmp_path: Path) -> None:
    first = Saves(5)
    trainer_of(tmp_path, first, accumulate=2, max_steps=7).fit(Toy(), ToyData())
    assert first.at == [(5, 9), (7, 13)]  # batch numbers from 0: the second micro-batch of the step
    second = Saves(5)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    trainer_of(tmp_path, second, accumulate=2, max_steps=10).fit(Toy(), ToyData(), ckpt_path=last)
    assert second.at == [(10, 19)]


def test_what_was_loaded_is_not_saved_again(tmp_path: Path) -> None:
    class StopAtOnce(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.should_stop = True

    trainer_of(tmp_path, Checkpoint(), max_steps=2).fit(Toy(), ToyData())
    save, last = Saves(), str(tmp_path / "checkpoints" / "last.ckpt")
    trainer_of(tmp_path, StopAtOnce(), save).fit(Toy(), ToyData(), ckpt_path=last)
    assert save.at == []


class Stop(pl.Callback):
    """Ask to stop after a certain batch, as `max_time` does."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch[0] >= self.batch:
            trainer.should_stop = True


def test_a_stop_between_micro_batches_waits_for_the_step_and_is_saved(tmp_path: Path) -> None:
    save = Saves(1000)
    module = Toy()
    trainer_of(tmp_path, Stop(8), save, accumulate=3).fit(module, ToyData())
    assert module.seen[-1] == 8
    assert save.at == [(3, 8)]
    save, module = Saves(1000), Toy()
    trainer_of(tmp_path / "b", Stop(6), save, accumulate=3).fit(module, ToyData())
    assert module.seen[-1] == 8
    assert save.at == [(3, 8)]


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(tmp_path: Path) -> None:
    for name, limits in {"whole": [10], "parts": [4, 7, 10]}.items():  # validation is due at 4, not at 7
        for max_steps in limits:
            last = tmp_path / name / "checkpoints" / "last.ckpt"
            ckpt_path = str(last) if last.exists() else None
            trainer = trainer_of(tmp_path / name, BestCheckpoint(), Checkpoint(SAVE_EVERY), max_steps=max_steps)
            trainer.fit(Toy(), ToyData(), ckpt_path=ckpt_path)
    states = [load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts")]
    assert_same_state(*states)
    tables = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("whole", "parts")]
    assert tables[0] == tables[1]


def test_keep_and_last(tmp_path: Path) -> None:
    trainer_of(tmp_path, Checkpoint(2, keep=3)).fit(Toy(), ToyData())
    folder = tmp_path / "checkpoints"
    names = ["last.ckpt", "step=0000008.ckpt", "step=0000010.ckpt", "step=0000012.ckpt"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert os.readlink(folder / "last.ckpt") == "step=0000012.ckpt"  # relative: the run folder may be moved


def test_a_validation_that_is_due_comes_before_the_save(tmp_path: Path) -> None:
    lines = []

    class Lines(Checkpoint):
        def _write(self, trainer, name):
            text = (tmp_path / "metrics.csv").read_text()
            lines.append((trainer.global_step, len(text.splitlines())))
            super()._write(trainer, name)

    trainer_of(tmp_path, Lines(4)).fit(Toy(), ToyData())
    assert lines == [(4, 6), (8, 11), (12, 16)]  # header, the steps' rows, and one more for each validation


def test_log_rows_reach_the_disk_before_the_checkpoint_does(tmp_path: Path) -> None:
    saved = []

    class Saved(MetricsLogger):
        def save(self):
            rows = len(self.path.read_text().splitlines()) - 1 if self.path.exists() else 0
            saved.append((rows, (tmp_path / "checkpoints").exists()))
            super().save()

    trainer = trainer_of(tmp_path, Checkpoint(), max_steps=2)
    trainer.loggers = [Saved(tmp_path)]
    trainer.fit(Toy(), ToyData())
    assert (2, False) in saved  # both steps' rows, and no checkpoint yet


def test_saves_without_any_validation(tmp_path: Path) -> None:
    trainer_of(tmp_path, BestCheckpoint(), Checkpoint(4), limit_val_batches=0).fit(Toy(), ToyData())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step=0000012.ckpt",
    ]


def test_best_follows_the_monitored_metric(tmp_path: Path) -> None:
    class Scores(Toy):
        scores = float("nan"), 3.0, 2.0, 2.5

        def validation_step(self, batch, batch_idx):
            step = self.trainer.global_step
            self.log("val/loss", self.scores[step // 2 - 1], logger=False)

    best = BestCheckpoint()
    trainer_of(tmp_path, best, Checkpoint(2), max_steps=8, val_check_interval=2).fit(Scores(), ToyData())
    assert best.best_model_score == 2.0
    assert load(tmp_path / "checkpoints" / "best.ckpt")["global_step"] == 6
    states = load(tmp_path / "checkpoints" / "last.ckpt")["callbacks"]
    assert [state for key, state in states.items() if "Best" in key] == [{"best_model_score": 2.0}]


def test_best_refuses_a_metric_that_validation_does_not_log(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, BestCheckpoint("val/typo"), Checkpoint())
    with pytest.raises(ValueError, match=r"best\.monitor 'val/typo'.*expected one of.*val/loss"):
        trainer.fit(Toy(), ToyData())


def test_refuses_intervals_below_one() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps 0"):
        Checkpoint(0)
    with pytest.raises(ValueError, match="keep 0"):
        Checkpoint(keep=0)
