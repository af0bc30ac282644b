"""From what a user says of a corpus (a folder, a file, a glob, or several) to the files it is made of."""

from __future__ import annotations

import glob
import os
from itertools import takewhile
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
    found: list[str] = []
    roots: list[str] = []
    for one in paths:
        expanded = os.path.expandvars(os.path.expanduser(one))
        if os.path.isdir(expanded):
            files = _walk(os.path.abspath(expanded))
            if not files:
                raise ValueError(f"corpus {corpus!r}: the folder {one!r} holds no file; give one with the data in it")
            roots.append(os.path.abspath(expanded))
        elif os.path.isfile(expanded):
            files = [os.path.abspath(expanded)]
            roots.append(os.path.dirname(files[0]))
        elif glob.has_magic(expanded):
            files = [os.path.abspath(file) for file in glob.glob(expanded, recursive=True) if os.path.isfile(file)]
            if not files:
                raise ValueError(
                    f"corpus {corpus!r}: the glob {one!r} matches no file (from {os.getcwd()}); check it with ls"
                )
            roots.append(os.path.abspath(_fixed_part(expanded)))
        else:
            raise ValueError(
                f"corpus {corpus!r}: {one!r} does not exist (from {os.getcwd()}); "
                "give the path of a folder or file, or a glob"
            )
        found += files
    return Path(os.path.commonpath(roots)), [Path(file) for file in sorted(set(found))]


def check_apart(path: str | list[str], val: str | list[str], corpus: str) -> None:
    """Raise ValueError where what is validated is trained on, unless it is the same on purpose."""
    shared = set(find_files(path, corpus)[1]) & set(find_files(val, corpus)[1]) if path != val else set()
    if shared:
        raise ValueError(
            f"corpus {corpus!r}: {len(shared)} files of val {val!r} are also in path {path!r}, such as "
            f"{str(min(shared))!r}, and would be trained on: give path the other folders, or a glob"
        )


def _walk(folder: str) -> list[str]:
    files = []
    seen = set()  # a link to a folder above would be followed for ever
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [os.path.join(place, name) for name in names if not name.startswith(".")]
    return files


def _fixed_part(pattern: str) -> str:
    """The folder before the first part with magic: keys must not change when the pattern finds another file."""
    return os.path.join("", *takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))


def stamps(files: list[Path], root: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of last change of each file: what says that a corpus has to be read again."""
    return [(relative(file, root), *_size_and_time(file)) for file in files]


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        stat = os.stat(file)
    except (OSError, ValueError):  # a link that leads nowhere, a name that cannot be one: its record will say so
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def relative(file: str | Path, root: Path) -> str:
    """`file` as seen from `root`, with forward slashes: a name that does not depend on where the data lies."""
    path, base = os.fspath(file), os.path.join(root, "")
    # `relpath` is slow for a million files, of which nearly all lie below
    path = path[len(base) :] if path.startswith(base) else os.path.relpath(path, root)
    return path.replace(os.sep, "/")
