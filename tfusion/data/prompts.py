"""`prompts.jsonl`: a request a line, read and checked before anything is generated."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tfusion.requests import GenerationConfig, Request, parse_request


def read_prompts(path: str | os.PathLike[str], defaults: GenerationConfig) -> list[Request]:
    """The requests of a file; blank lines are skipped, image paths are relative to the file.

    Args:
        path: UTF-8, a JSON object a line; `parse_request` says what is in it.
        defaults: generation settings for what a line does not set.

    Raises:
        ValueError: no such file, no request in it, or a bad line; names the file and the line's number.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f'no prompts file {str(path)!r}; give a file of lines such as {{"segments": [{{"text": "cat"}}]}}'
        )
    requests = []
    # Bytes are cut at line ends only; str.splitlines would also cut at U+2028, which JSON allows inside a
    # string.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            requests.append(parse_request(parse_json(line), defaults, path.parent))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not requests:
        raise ValueError(f'{path} holds no request; write at least one line, such as {{"segments": ["cat"]}}')
    return requests


def parse_json(line: bytes) -> object:
    """What a line of a file holds; raises ValueError that says what is wrong with it."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno}); expected one object a line") from error
