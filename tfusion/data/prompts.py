"""`prompts.jsonl`: a request a line, read and checked before anything is generated."""

from __future__ import annotations

import os
from pathlib import Path

from tfusion.data.json_lines import read_json_lines
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
    for where, line in read_json_lines(path):
        try:
            requests.append(parse_request(line, defaults, path.parent))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    if not requests:
        raise ValueError(f'{path} holds no request; write at least one line, such as {{"segments": ["cat"]}}')
    return requests
