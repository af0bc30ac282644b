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

SIMILAR = 0.75  # as difflib counts; of a pair of names the share of letters in common
# How jsonargparse words an unknown option: of a command, or of the class that was named last before it.
OF_A_COMMAND = re.compile(r"unrecognized arguments: --?([\w.]+)|does not accept option '([\w.]+)'")
OF_A_CLASS = re.compile(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")


class Parser(LightningArgumentParser):
    """A parser that says what is wrong, and what may have been meant, last and without the usage."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: two hundred options would push the message off the screen; `--help` has them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message, and the nearest name to an unknown one."""
        nearest = meant(message, _keys(self))
        super().error(message if nearest is None else f"{message}\ndid you mean {nearest}?", ex)


def meant(message: str, keys: Iterable[str]) -> str | None:
    """The option nearest to the unknown one that a message of jsonargparse names; None where there is none.

    Args:
        message: what it says.
        keys: options of the command.
    """
    if unknown := OF_A_CLASS.search(message):
        path, name = unknown.groups()
        owner = locate(path)
        return None if owner is None else _nearest(name, inspect.signature(owner).parameters)
    if unknown := OF_A_COMMAND.search(message):
        return _nearest(unknown[1] or unknown[2], keys)
    return None


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """Also of a name whose beginning alone is known: what lies within a class is no option of the command."""
    parts, known = name.split("."), list(known)
    for count in range(len(parts), 0, -1):
        if found := get_close_matches(".".join(parts[:count]), known, 1, SIMILAR):
            return ".".join([*found, *parts[count:]])
    return None


def _keys(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Names of a parser's options and of its commands'."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from _keys(command)
        else:
            yield action.dest
