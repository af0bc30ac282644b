"""From what a user says of a corpus (a folder, a file, a glob, or several) to the files it is made of."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def find_files(path: str | list[str], corpus: str) -> tuple[Path, list[Path]]:
    """The folder that keys are relative to, and all files, sorted; hidden files and folders are left out.

    Args:
        path: folders (with all that is in them), files, or globs (`shards/*.tar`, `**` for any depth); `~` and
            environment variables (`$DATA/shards`) are expanded.
        corpus: named in errors.

    Raises:
        ValueError: nothing there; says for which path.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise ValueError(f"corpus {corpus!r}: path is an empty list; give a folder, a file, a glob or several")
    found: list[Path] = []
    roots: list[str] = []
    for one in paths:
        expanded = os.path.expandvars(os.path.expanduser(one))
        if os.path.isdir(expanded):
            files = _walk(Path(expanded))
            if not files:
                raise ValueError(f"corpus {corpus!r}: the folder {one!r} holds no file; give one with the data in it")
            roots.append(expanded)
        elif os.path.isfile(expanded):
            files = [Path(expanded)]
            roots.append(os.path.dirname(expanded) or ".")
        elif glob.has_magic(expanded):
            files = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if os.path.isfile(p))
            if not files:
                raise ValueError(
                    f"corpus {corpus!r}: the glob {one!r} matches no file (from {os.getcwd()}); check it with ls"
                )
            roots.append(os.path.commonpath([os.path.abspath(file.parent) for file in files]))
        else:
            raise ValueError(
                f"corpus {corpus!r}: {one!r} does not exist (from {os.getcwd()}); "
                "give the path of a folder or file, or a glob"
            )
        found += files
    root = Path(os.path.commonpath([os.path.abspath(root) for root in roots]))
    return root, sorted({Path(os.path.abspath(file)) for file in found})


def _walk(folder: Path) -> list[Path]:
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return files


def stamps(files: list[Path], root: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of last change of each file: what says that a corpus has to be read again."""
    stats = [(file, file.stat()) for file in files]
    return [(relative(file, root), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def relative(file: Path, root: Path) -> str:
    """`file` as seen from `root`, with forward slashes: a name that does not depend on where the data lies."""
    return Path(os.path.relpath(file, root)).as_posix()
