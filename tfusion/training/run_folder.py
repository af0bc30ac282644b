"""The run folder, `trainer.default_root_dir`: which checkpoint is meant, who may write, and its two logs.

    config.yaml  metrics.csv  events.out.tfevents.*  samples/  predictions/  checkpoints/

Nothing else decides where a run's files go. No training logic here, and nothing of the command line.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

CHECKPOINT_NAMES = ("last", "best")


def find_checkpoint(root: Path, ckpt_path: str) -> Path:
    """Return the file that `--ckpt_path` means: `last` or `best` of the run folder, else a path as given.

    Raises:
        ValueError: there is no such file. A missing `last` is never a fresh start.
    """
    named = ckpt_path in CHECKPOINT_NAMES
    path = root / "checkpoints" / f"{ckpt_path}.ckpt" if named else Path(ckpt_path).expanduser().absolute()
    if not path.exists():  # follows links: a `last` that points nowhere is missing
        hint = "expected 'last', 'best' or the path of a checkpoint"
        if named and (there := _checkpoints(root)):
            hint = f"the run folder {root} has {', '.join(there)}: give --ckpt_path {_newest(root, there)}"
        elif named:
            hint = (
                f"the run folder {root} has no checkpoint: pass the folder of the run you mean with "
                "--trainer.default_root_dir, or a checkpoint's path"
            )
        raise ValueError(f"got --ckpt_path {ckpt_path}, but {path} does not exist; {hint}")
    return path


def _checkpoints(root: Path) -> list[str]:
    """Names of those that are there; a link that points nowhere is none."""
    return sorted(path.name for path in (root / "checkpoints").glob("*.ckpt") if path.exists())


def _newest(root: Path, names: list[str]) -> str:
    """What `--ckpt_path` is given for it; a run killed early may have only best.ckpt, or a file without `last`."""
    return "last" if "last.ckpt" in names else str(root / "checkpoints" / names[-1])


def refuse_used_folder(root: Path) -> None:
    """Raise ValueError where a fresh `fit` would run over the checkpoints of an earlier one, or one that runs."""
    used = _checkpoints(root)
    if used:
        _refuse_busy_folder(root)
        raise ValueError(
            f"the run folder {root} holds checkpoints ({', '.join(used)}) and no --ckpt_path was given; "
            f"go on with that run (--ckpt_path {_newest(root, used)}), choose another folder "
            "(--trainer.default_root_dir), or delete this one"
        )


def _refuse_busy_folder(root: Path) -> None:
    """Raise ValueError where another process writes there: by a lock that is shared, for all ranks ask at once."""
    path = root.resolve() / ".lock"
    if path not in _locks and path.exists():
        with suppress(OSError):  # another's folder that can only be read, or a file system without locks
            _locked(root, fcntl.LOCK_SH).close()


_locks: dict[Path, TextIO] = {}  # open files: the OS drops a lock when its file is closed


def lock(root: Path) -> None:
    """Make this process the only one that writes the run folder, until it ends (however it ends).

    A POSIX record lock (`lockf`), because `flock`'s would live on in forked data workers after a kill. Taking
    it twice in one process is allowed.

    Raises:
        ValueError: another process holds it.
    """
    path = root.resolve() / ".lock"
    if path in _locks:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(root, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(f"pid {os.getpid()}\n")
    file.flush()
    _locks[path] = file


def _locked(root: Path, kind: int) -> TextIO:
    """The folder's file, locked until it is closed; ValueError where another process has it."""
    file = open(root.resolve() / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (kept open on purpose)
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise ValueError(
            f"another process ({owner or 'unknown'}) is writing the run folder {root}; wait for it to end, "
            "or choose another folder (--trainer.default_root_dir)"
        ) from error
    return file


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader, or a kill, sees the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metrics(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and whole rows of a metrics.csv, of which there may be none yet; a row torn by a kill is left out."""
    if not path.exists():
        return [], []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    header, *rows = list(csv.reader(lines)) or [[]]
    whole = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    return header, [row for row in whole if _is_step(row.get("step", ""))]


class MetricsLogger(Logger):
    """`metrics.csv`: one header, a row a call in order of steps, each in the file as soon as it is logged.

    A resumed run cuts the file back to its own step and appends, so the file of a killed and resumed run is,
    byte for byte, that of a run which was never killed. Floats are written with `repr`, exactly. Unlike
    Lightning's CSVLogger it never deletes a file that is there.

    Args:
        root: the run folder.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__()
        self._root = Path(root)
        self._file: TextIO | None = None
        self._columns: list[str] = []
        self._last_step = -1

    @property
    def path(self) -> Path:
        return self._root / "metrics.csv"

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> None:
        """No object behind the logger: what asks one for `add_image` finds that it has none."""

    @property
    def save_dir(self) -> str:
        return str(self._root)  # Lightning's `trainer.log_dir` is the first logger's

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a row; a new column widens the header, and a row of an earlier step moves to its place."""
        if self._file is None:
            self._rewrite(self._read_rows())
        row = {"step": str(self._last_step if step is None else step)}
        row |= {name: _cell(value) for name, value in metrics.items() if name != "step"}
        known = set(self._columns)
        new = [name for name in row if name not in known]
        if new or int(row["step"]) < self._last_step:
            self._columns += new
            self._rewrite([*self._read_rows(), row])
            return
        self._last_step = int(row["step"])
        csv.writer(self._file, lineterminator="\n").writerow([row.get(name, "") for name in self._columns])
        self._file.flush()

    @rank_zero_only
    def cut(self, global_step: int) -> None:
        """Drop the rows after `global_step` and any torn one (-1: all, and the header, for a fresh start)."""
        if not self.path.exists():
            return
        rows = [row for row in self._read_rows() if int(row["step"]) <= global_step]
        if global_step < 0:
            self._columns = []
        self._rewrite(rows)

    @rank_zero_only
    def save(self) -> None:
        """Bring the rows to the disk itself; they are in the file already."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Save and close; a later row would open the file again."""
        if self._file is not None:
            self.save()
            self._file.close()
            self._file = None

    def _read_rows(self) -> list[dict[str, str]]:
        """Return the whole rows of the file, and take over its header. A row torn by a kill is left out."""
        header, rows = read_metrics(self.path)
        self._columns = header + [name for name in self._columns if name not in header]
        return rows

    def _rewrite(self, rows: Iterable[Mapping[str, str]]) -> None:
        rows = sorted(rows, key=lambda row: int(row["step"]))  # stable
        if self._file is not None:
            self._file.close()
        temporary = self.path.with_name(".metrics.csv.tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([self._columns] if self._columns else [])
            writer.writerows([row.get(name, "") for name in self._columns] for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._last_step = int(rows[-1]["step"]) if rows else -1


def _cell(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    return repr(value) if isinstance(value, float) else str(value)


def _is_step(cell: str) -> bool:
    return cell.removeprefix("-").isdigit()


class EventsLogger(TensorBoardLogger):
    """TensorBoard events in the run folder itself, without `version_*` folders or `hparams.yaml`.

    Args:
        root: the run folder.
    """

    def __init__(self, root: str | Path) -> None:
        super().__init__(save_dir=str(root), name="", version="")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()  # Lightning's also writes hparams.yaml

    @rank_zero_only
    def cut(self, global_step: int) -> None:
        """Have TensorBoard hide what an earlier process logged after `global_step` (its files only grow)."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # What `SummaryWriter(purge_step=...)` writes; the step is known only after the writer has been made.
        start = SessionLog(status=SessionLog.START)
        self.experiment.file_writer.add_event(Event(step=global_step + 1, session_log=start))
