"""Ranked choice: questions with several continuations of one context, of which the likeliest should be the right one.

What the Transfusion paper's language suite asks (HellaSwag, PIQA, ARC, ...), from files of
`{"context": "The cat sat on the", "choices": [" mat.", " moon."], "answer": 0}`, a question a line. Each choice is a
document of its own, `[BOS] context choice`, of which only the choice's tokens are scored.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tfusion.data.json_lines import read_json_lines
from tfusion.data.validation import ValidationRows
from tfusion.sequence import IGNORE_INDEX, LABEL_MULTIPLE, Batch, Document, Row
from tfusion.tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class Question:
    """One line of a file.

    Attributes:
        context: what stands before each choice; may be empty. Nothing is put between them.
        choices: two or more.
        answer: the number of the right one.
        source: file and line, for errors.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    source: str = ""


@dataclass(frozen=True, eq=False)
class ChoiceDocument(Document):
    """`[BOS] context choice`, its two elements; `number` counts the choices of all questions of a file."""

    number: int = 0


def read_choices(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a file; blank lines are skipped, and other keys than the three allowed (ids, subjects).

    Args:
        path: UTF-8, a JSON object a line; `~` and environment variables are expanded.

    Raises:
        ValueError: no such file, no question in it, or a bad line; names the file, the line's number and the key.
    """
    file = Path(os.path.expandvars(os.path.expanduser(path)))
    if not file.is_file():
        raise ValueError(
            f'no choices file {str(path)!r}; give a file of lines such as {{"context": "The cat sat on the", '
            '"choices": [" mat.", " moon."], "answer": 0}'
        )
    questions = []
    for where, line in read_json_lines(file):
        try:
            questions.append(_question(line, where))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not questions:
        raise ValueError(f'{file} holds no question; write at least one line with "context", "choices" and "answer"')
    return questions


def _question(line: Any, source: str) -> Question:
    if not isinstance(line, dict):
        raise ValueError(f'got {type(line).__name__}, expected an object with "context", "choices" and "answer"')
    for key in ("context", "choices", "answer"):
        if key not in line:
            raise ValueError(f'key "{key}" is missing; expected "context", "choices" and "answer"')
    context, choices, answer = line["context"], line["choices"], line["answer"]
    if not isinstance(context, str):
        raise ValueError(f'key "context": got {context!r}, expected a text')
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f'key "choices": got {choices!r}, expected a list of texts')
    if len(choices) < 2:
        raise ValueError(f'key "choices": got {len(choices)}, expected at least two')
    for number, choice in enumerate(choices):
        if not choice.strip():
            raise ValueError(f'key "choices": number {number} is {choice!r}, expected a text that is not empty')
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f'key "answer": got {answer!r}, expected a number from 0 to {len(choices) - 1}')
    return Question(context, tuple(choices), answer, source)


def choice_documents(
    questions: Sequence[Question], tokenizer: TextTokenizer, seq_len: int
) -> tuple[list[ChoiceDocument], int]:
    """The choices of all questions in order, and how many questions' contexts were cut at their beginning.

    Context and choice are encoded apart, as a prompt and what is generated after it are. So the tokens scored are
    those of the choice alone, whichever tokens its first characters might have made with the context's last. All
    choices of a question follow the same context: what a row leaves before the longest of them.

    Raises:
        ValueError: a choice that fits no row, or that has no token; names file and line.
    """
    contexts = tokenizer.encode_batch([question.context for question in questions])
    choices = iter(tokenizer.encode_batch([choice for question in questions for choice in question.choices]))
    documents: list[ChoiceDocument] = []
    cut = 0
    for question, context in zip(questions, contexts, strict=True):
        ids = list(islice(choices, len(question.choices)))
        lengths = list(map(len, ids))
        room = seq_len - 1 - max(lengths)  # after BOS
        if room < 0:
            raise ValueError(
                f'{question.source}: key "choices": number {lengths.index(max(lengths))} has {max(lengths)} tokens, '
                f"data.seq_len is {seq_len}: raise it to at least {max(lengths) + 1}, or shorten the choice"
            )
        if min(lengths) == 0:
            raise ValueError(
                f'{question.source}: key "choices": number {lengths.index(0)} has no token in this tokenizer, '
                "expected at least one"
            )
        cut += len(context) > room
        kept = np.asarray(context[max(0, len(context) - room) :], np.int32)  # arrays: small, for there may be many
        for choice in ids:
            elements = (kept, np.asarray(choice, np.int32))
            documents.append(ChoiceDocument(elements, eos=False, number=len(documents)))  # type: ignore[arg-type]
    return documents, cut


class ChoiceRows(ValidationRows):
    """Rows of whole `ChoiceDocument`s in file order; `choice_ids` of their batches says whose each label is."""

    def pack(self, documents: Iterator[Document]) -> Iterator[list[Document]]:
        """Rows of what fits; none is cut."""
        row = Row(self.shape)
        for document in documents:
            if not row.fits(document):
                yield row.documents
                row = Row(self.shape)
            row.add(document)
        yield row.documents

    def collate(self, rows: list[tuple[int, list[Document]]]) -> Batch:
        """A batch in which only the choices' tokens are labels: (N,) positions, labels and choice numbers."""
        batch = super().collate(rows)
        numbers = np.full(tuple(batch.token_ids.shape), -1, np.int64)  # (B, T)
        for row, (_, documents) in zip(numbers, rows, strict=True):
            end = 0
            for document in documents:
                end += document.length(0)
                row[end - 1 - len(document.elements[-1]) : end - 1] = document.number  # each input's label is the next
        positions = np.flatnonzero(numbers >= 0)
        padding = -len(positions) % LABEL_MULTIPLE if len(positions) else LABEL_MULTIPLE
        labels = batch.token_ids.numpy().reshape(-1)[positions + 1]
        return dataclasses.replace(
            batch,
            text_positions=torch.from_numpy(np.pad(positions, (0, padding))),
            text_labels=torch.from_numpy(np.pad(labels, (0, padding), constant_values=IGNORE_INDEX)),
            choice_ids=torch.from_numpy(np.pad(numbers.reshape(-1)[positions], (0, padding), constant_values=-1)),
        )
