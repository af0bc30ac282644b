"""The paper's comparison at a scale of minutes: each system trained, measured, one table.

    python -m tfusion.bench.systems --out runs/systems --jobs 2
    python -m tfusion.bench.systems --out runs/systems --only chameleon

Every system is a base of `configs/small/` with overlays of `configs/ablation/`. A step of those of both modalities has
the same number of positions, half of them text; text-only and diffusion-only see that half of it which is theirs.
Each is `tfusion fit`, then `tfusion validate`; a run that was cut off goes on from its last checkpoint, one that is
done is only read, and one that was made by another command is refused: give trials an `--out` of their own. All of them
take about 5 hours with one core each. Says on stderr what begins and ends; prints the table in markdown; `--out`/
systems.json holds all numbers, of earlier calls as well. The systems read scenes out of the caches `runs/encode` and
`runs/encode_ids` of our small autoencoders (the configs' headers say how to make them).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfusion.bench.systems_table import as_table
from tfusion.training.run_folder import read_metrics, write_atomically


@dataclass(frozen=True)
class System:
    """A line of the table.

    Attributes:
        name: such as `transfusion-linear-64`: 64 patches an image.
        base: of `configs/small/`.
        overlays: of `configs/ablation/`.
        seeds: of data and weights.
    """

    name: str
    base: str
    overlays: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)

    def configs(self, folder: Path) -> list[Path]:
        """In the order in which they are given."""
        return [folder / "small" / f"{self.base}.yaml", *(folder / "ablation" / f"{o}.yaml" for o in self.overlays)]


SYSTEMS = (
    System("transfusion-linear-64", "transfusion", ("patch_2",), (0, 1)),
    System("chameleon", "chameleon", (), (0, 1)),
    System("diffusion-only", "diffusion_only", ("patch_2",), (0, 1)),
    System("text-only", "text_only", (), (0, 1)),
    System("transfusion-unet-64", "transfusion", ("patch_2", "unet_small")),
    System("transfusion-linear-16", "transfusion", ("patch_4",)),
    System("transfusion-unet-16", "transfusion", ("patch_4", "unet_small")),
    System("transfusion-linear-256", "transfusion", ("patch_1",), (0, 1)),
    System("transfusion-unet-256", "transfusion", ("patch_1", "unet_small")),
    System("captions-no-limit", "transfusion", ("patch_4", "image_first", "no_noise_limit")),
    System("captions-limit-500", "transfusion", ("patch_4", "image_first")),
    System("captions-limit-0", "transfusion", ("patch_4", "image_first", "noise_limit_0")),
    System("captions-unet-16", "transfusion", ("patch_4", "unet_small", "image_first")),
    System("causal-linear-64", "transfusion", ("patch_2", "causal")),
    System("causal-unet-64", "transfusion", ("patch_2", "unet_small", "causal")),
)


CHILDREN: set[subprocess.Popen] = set()


def call(args: list[str], log: Path, threads: int) -> int:
    """Run a command, its output at the end of a file, and return what it exits with."""
    with log.open("a", encoding="utf-8") as output:
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        child = subprocess.Popen(args, stdout=output, stderr=subprocess.STDOUT, env=env)
    CHILDREN.add(child)
    try:
        return child.wait()
    finally:
        CHILDREN.discard(child)


def stop(number: int, frame: Any) -> None:
    """End what runs as well: alone it would train on, beside what the next call starts."""
    for child in list(CHILDREN):
        child.terminate()
    say("stopped; the same command goes on from the last checkpoints")
    os._exit(128 + number)


def say(what: str) -> None:
    sys.stderr.write(what + "\n")
    sys.stderr.flush()


def command(system: System, seed: int, root: Path, configs: Path, extra: list[str]) -> list[str]:
    """`tfusion fit` of a system, from where it stands."""
    args = [sys.executable, "-m", "tfusion", "fit"]
    for path in system.configs(configs):
        args += ["--config", str(path)]
    args += ["--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"]
    args += ["--generation_metrics.every_n_steps", "1000000000"]  # `validate` measures
    return [*args, "--data.seed", str(seed), "--model.init_args.seed", str(seed), *extra]


def run(system: System, seed: int, out: Path, configs: Path, threads: int, extra: list[str]) -> dict[str, Any]:
    """Train, validate and read one run; what is done already is not done again."""
    root = out / f"{system.name}-seed{seed}"
    root.mkdir(parents=True, exist_ok=True)
    fit, label = command(system, seed, root, configs, extra), f"{system.name}, seed {seed}"
    asked = root / "command.json"
    if asked.exists() and json.loads(asked.read_text(encoding="utf-8")) != fit[1:]:
        return failed(system, seed, f"{root} was made by another command (command.json): give another --out")
    write_atomically(asked, json.dumps(fit[1:]) + "\n")
    if (root / "checkpoints" / "last.ckpt").exists():
        fit += ["--ckpt_path", "last"]
    validate = [sys.executable, "-m", "tfusion", "validate", "--config", str(root / "config.yaml")]
    validate += ["--ckpt_path", "last", "--trainer.enable_progress_bar", "false"]
    marks = {"fit": root / "fitted", "validate": root / "validation.json"}
    for name, args in (("fit", fit), ("validate", validate)):
        if marks["validate"].exists() or marks[name].exists():
            continue
        log = root / f"{name}.log"
        say(f"{label}: {name} (its output: {log})")
        if call(args, log, threads):
            return failed(system, seed, f"{name}: {last_words(log)} (all: {log})")
        (root / "fitted").touch()
    say(f"{label}: done")
    return read(system.name, seed, root)


def last_words(log: Path) -> str:
    """What a command said before it ended: its refusal, else its last line."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    said = [line for line in lines if line.strip()]
    return next((line for line in reversed(said) if line.startswith("tfusion: error: ")), said[-1] if said else "")


def failed(system: System, seed: int, why: str) -> dict[str, Any]:
    """A line of the table that says why it has no figures."""
    say(f"{system.name}, seed {seed}: {why}")
    return {"system": system.name, "seed": seed, "failed": why}


def read(name: str, seed: int, root: Path) -> dict[str, Any]:
    """What a finished run measured and cost."""
    validation = json.loads((root / "validation.json").read_text(encoding="utf-8"))
    rows = read_metrics(root / "metrics.csv")[1]
    trained = [row for row in rows if row.get("train/flops")][-1]
    return {
        "system": name,
        "seed": seed,
        "steps": int(trained["step"]),
        "train_flops": float(trained["train/flops"]),
        "train_s": float(trained["train/seconds"]),
        "metrics": {one["name"]: one["value"] for one in validation["measurements"]},
        "errors": {one["name"]: one["standard_error"] for one in validation["measurements"]},
    }


def write(file: Path, results: list[dict[str, Any]]) -> None:
    """Put the results into the file, in the place of older ones of the same runs."""
    older = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    runs = {(result["system"], result["seed"]): result for result in older + results}
    write_atomically(file, json.dumps(list(runs.values()), indent=1) + "\n")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/systems"), help="the folder of the runs")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="the repository's configs")
    parser.add_argument("--only", default="", help="systems whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of a system's")
    parser.add_argument("--threads", type=int, help="of each run; by default OMP_NUM_THREADS, or the cores / jobs")
    parser.add_argument(
        "extra", nargs="*", help="after --: more arguments of `tfusion fit`, such as --trainer.max_steps 20"
    )
    options = parser.parse_args(args)
    share = max(1, (os.cpu_count() or 1) // options.jobs)
    threads = options.threads or int(os.environ.get("OMP_NUM_THREADS", share))
    named = [(system, seed) for system in SYSTEMS if options.only in system.name for seed in system.seeds]
    chosen = [(system, seed) for system, seed in named if options.seeds is None or seed in options.seeds]
    if not chosen:
        names = ", ".join(f"{system.name} ({len(system.seeds)})" for system in SYSTEMS)
        parser.error(f"no system's name contains {options.only!r}, with these seeds; there are (seeds): {names}")
    options.out.mkdir(parents=True, exist_ok=True)
    settings = (options.out, options.configs, threads, options.extra)
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = [pool.submit(run, *one, *settings) for one in chosen]
            for done in as_completed(runs):
                write(options.out / "systems.json", [done.result()])
    finally:  # of who called: a pool of processes could not end what it forks
        for number, handler in handlers.items():
            signal.signal(number, handler)
    results = [one.result() for one in runs]
    sys.stdout.write(as_table(results))
    if any("failed" in result for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
