"""The parser of the command line, whose refusals can be read."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pydoc import locate
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

SIMILAR = 0.75  # difflib's ratio, from which on one name may be meant by another
# How jsonargparse words an unknown option: of a command, or of the class that was named last before it.
OF_A_COMMAND = re.compile(r"unrecognized arguments: --?([\w.]+)|does not accept option '([\w.]+)'")
OF_A_CLASS = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")


class Parser(LightningArgumentParser):
    """A parser that says what is wrong, and what may have been meant, last and without the usage."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: two hundred options would push the message off the screen; `--help` has them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message, and the nearest name to an unknown one."""
        # parsers of classes are made of this class, too: what they say becomes part of what the command's says
        nearest = meant(message, _keys(self)) if self.exit_on_error else None
        super().error(message if nearest is None else f"{message}\ndid you mean {nearest}?", ex)


def meant(message: str, keys: Iterable[str]) -> str | None:
    """The option nearest to the unknown one that a message of jsonargparse names; None where there is none.

    Args:
        message: what it says.
        keys: options of the command.
    """
    if unknown := OF_A_CLASS.search(message):
        path, name = unknown.groups()
        return _nearest(name, _arguments(locate(path)))
    if unknown := OF_A_COMMAND.search(message):
        name = unknown[1] or unknown[2]
        nearest = _nearest(name, [part for key in keys for part in _beginnings(key)])
        return None if nearest == name else nearest
    return None


def _beginnings(key: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c: groups can be mistyped, too."""
    parts = key.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _nearest(name: str, known: list[str]) -> str | None:
    """The known one whose last part is nearest; where nothing is known of a group's options, as within a class, the
    name with its group mended.
    """
    group, _, last = name.rpartition(".")
    options = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == group}
    if options:
        return next((options[found] for found in get_close_matches(last, options, 1, SIMILAR)), None)
    mended = _nearest(group, known) if group else None
    return None if mended is None else f"{mended}.{last}"


def _arguments(owner: Any) -> list[str]:
    try:
        parameters = inspect.signature(owner).parameters.values()
    except (TypeError, ValueError):  # nothing of that name, or not written in Python
        return []
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _keys(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Names of a parser's options and of its commands'."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from _keys(command)
        else:
            yield action.dest
