"""Small files of a JSON object a line, such as prompts and questions, read whole with each wrong line named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


def read_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """("FILE, line N", value) of each line that is not blank.

    Raises:
        ValueError: a line that is no UTF-8 or no JSON; names file and line.
    """
    # Bytes are cut at line ends only; str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parse(line, where)


def _parse(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); expected one object a line"
        ) from error
