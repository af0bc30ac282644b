"""Is the loader seen? Trains on a corpus and on the same batches out of memory. Prints one JSON object.

    python -m tfusion.bench.data --config configs/quickstart.yaml
    python -m tfusion.bench.data --config configs/pictures.yaml --config configs/data/flickr8k.yaml
    python -m tfusion.bench.data --config configs/small/transfusion.yaml --config configs/data/flickr8k_latents.yaml

Takes what `tfusion fit` takes, and trains the config's model on its data, on one device, without saving anything; a
flag of ours comes before or after. `--data.num_workers 1` asks for worker processes.

- `real_step_s`, `resident_step_s`: median seconds from the end of one optimizer step to the end of the next, so that
  waiting for the loader counts. One fit takes some steps from the loader and the same batches again out of memory, in
  turn. What workers have made ahead during the other part is thrown away, and the first steps of either part, in which
  their queues fill again, are not counted.
- `ratio`: the first over the second, mean of the rounds, and its standard error; `ratio_of_means` is of mean seconds
  and sees rare long waits, too. 1.02 = within 2 %.
- `loader`: batches alone, taken as fast as they come, made by 0, 1 and 2 workers one after another: `images_per_s`
  and `positions_per_s` (without padding), medians of rounds. `images_a_step` and `positions_a_step` are what a step
  takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import lightning as L
import torch

from tfusion.__main__ import run
from tfusion.bench.check_data import DataCheck
from tfusion.bench.setting import DEVICE, in_turn, median, wait
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.data.steps import MicroBatches
from tfusion.sequence import Batch
from tfusion.training.trainer_settings import precision_on


class StepEnds(L.Callback):
    """Seconds from the end of one optimizer step to the end of the next, by part; the first of a part are left out."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self.times: list[list[float]] = []
        self.last = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if (args[-1] + 1) % trainer.accumulate_grad_batches:
            return
        wait()
        now = time.perf_counter()
        place = (trainer.global_step - 1) % (self.warmup + self.steps)
        if place == 0:
            self.times.append([])
        if place >= self.warmup:
            self.times[-1].append(now - self.last)
        self.last = now


class InTurn:
    """Micro-batches as a loader gives them, `many` at a time, and the same again out of memory, `rounds` times.

    `ahead` is how many the loader's workers have ready when it has not been asked for a while; a part that could live
    on them would not see a loader that is slower than a step.
    """

    def __init__(self, loader: Iterable[Batch], many: int, rounds: int, ahead: int) -> None:
        self.loader, self.many, self.rounds, self.ahead = loader, many, rounds, ahead
        self.resident: list[Batch] = []

    def __len__(self) -> int:  # known: else Lightning fetches one ahead, and a part pays for the other's
        return 2 * self.many * self.rounds

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        for _ in range(self.rounds):
            self.resident = []
            for _ in islice(batches, self.ahead):
                pass
            for batch in islice(batches, self.many):
                self.resident.append(batch)
                yield batch
            for batch in self.resident:
                batch.position = None  # of the data, which does not go on
            self.resident = [batch.to(DEVICE) for batch in self.resident]
            yield from self.resident


class Bench:
    """A module and its data, and trainers for them."""

    def __init__(self, module: L.LightningModule, data: MultimodalDataModule, settings: Any) -> None:
        self.module, self.data, self.workers = module, data, data.num_workers
        self.precision = precision_on(DEVICE.type, settings.precision or "32-true")  # as `fit` has it
        self.clip = settings.gradient_clip_val
        self.micro_batches = settings.accumulate_grad_batches or 1

    def trainer(self, steps: int, callbacks: list[L.Callback]) -> L.Trainer:
        return L.Trainer(
            accelerator=DEVICE.type,
            devices=1,
            precision=self.precision,
            accumulate_grad_batches=self.micro_batches,
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            gradient_clip_val=self.clip,
            callbacks=callbacks,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def loader(self, trainer: L.Trainer, workers: int) -> MicroBatches:
        """Training batches from the first on, as the data module gives them to this trainer."""
        self.data.trainer, self.data.num_workers = trainer, workers
        self.data.layout = self.data.layout_under(trainer)
        return self.data.train_dataloader()

    def fit(self, warmup: int, steps: int, rounds: int) -> tuple[list[Batch], list[list[float]], list[list[float]]]:
        """The last batches, and the seconds of the steps of each round: on the loader, and out of memory."""
        ends, many = StepEnds(warmup, steps), warmup + steps
        trainer = self.trainer(2 * many * (rounds + 1), [ends])
        loader = self.loader(trainer, self.workers)
        ahead = loader.steps.num_workers * (loader.steps.prefetch_factor or 0) * self.micro_batches
        batches = InTurn(loader, many * self.micro_batches, rounds + 1, ahead)
        trainer.fit(self.module, batches)
        return batches.resident, ends.times[2::2], ends.times[3::2]  # the first round compiles


def loader_rates(bench: Bench, workers: list[int], steps: int, rounds: int, warmup: int) -> dict[str, Any]:
    """Images and positions a second of the loader alone, by number of workers."""
    trainer = bench.trainer(1, [])
    counts: dict[str, list[tuple[int, int]]] = {str(number): [] for number in workers}

    def taker(name: str, batches: Iterator[Batch]) -> Any:
        def take() -> None:
            images = positions = 0
            for batch in islice(batches, steps * bench.micro_batches):
                batch = batch.to(DEVICE)
                images += int(batch.image_valid.sum())
                positions += int((batch.document_ids >= 0).sum())
            counts[name].append((images, positions))

        return take

    found = {}
    for name in counts:  # one after another: queues of workers would fill while it is another's turn
        taken = in_turn({name: taker(name, iter(bench.loader(trainer, int(name))))}, rounds, warmup)[name]
        of_rounds = list(zip(counts[name][-rounds:], taken, strict=True))
        found[name] = {
            "images_per_s": median([images / s for (images, _), s in of_rounds]),
            "positions_per_s": median([positions / s for (_, positions), s in of_rounds]),
        }
    return found


def ratio_of(name: str, real: list[list[float]], resident: list[list[float]], of: Any) -> dict[str, float]:
    """The mean of the rounds' ratios and, of more than one, its standard error."""
    ratios = [of(a) / of(b) for a, b in zip(real, resident, strict=True)]
    found = {name: statistics.mean(ratios)}
    if len(ratios) > 1:
        found[f"{name}_error"] = statistics.stdev(ratios) / len(ratios) ** 0.5
    return found


def measure(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """The JSON object."""
    resident, real, still = bench.fit(options.warmup, options.steps, options.rounds)
    data, many = bench.data, options.warmup + options.steps
    rows, seq_len = resident[0].token_ids.shape
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "corpora": [corpus.name for corpus in data.image_corpora + data.text_corpora],
        "kind": "latents" if resident[0].latents is not None else "pictures" if data.image_corpora else "text",
        "precision": str(bench.precision),
        "params": sum(p.numel() for p in bench.module.model.parameters()),
        "rows": rows * bench.micro_batches,
        "seq_len": seq_len,
        "workers": bench.workers,
        "steps": options.steps * options.rounds,
        "images_a_step": sum(int(batch.image_valid.sum()) for batch in resident) / many,
        "positions_a_step": sum(int((batch.document_ids >= 0).sum()) for batch in resident) / many,
        "real_step_s": median([seconds for times in real for seconds in times]),
        "resident_step_s": median([seconds for times in still for seconds in times]),
        **ratio_of("ratio", real, still, median),
        **ratio_of("ratio_of_means", real, still, statistics.mean),
        "loader": loader_rates(bench, options.workers, options.loader_steps, options.rounds, 2),
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=8, help="timed, of each part")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them; 1 where there is no worker")
    parser.add_argument("--rounds", type=int, default=20, help="parts of either kind, and rounds of the loader")
    parser.add_argument("--loader-steps", type=int, default=20, help="of the loader alone, a round")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="of the loader alone")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    options, of_fit = parser.parse_known_args(args)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cli = run(DataCheck, ["fit", *of_fit])
    bench = Bench(cli.model, cli.datamodule, cli.config_init["fit"].trainer)
    sys.stdout.write(json.dumps(measure(bench, options)) + "\n")


if __name__ == "__main__":
    main()
