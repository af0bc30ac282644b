"""Files of ranked choice: what is read, what is refused, which tokens are scored, and where they are in a batch."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from tfusion.data.choices import ChoiceRows, Question, choice_documents, read_choices
from tfusion.sequence import BOS_ID, IGNORE_INDEX, RowShape
from tfusion.tokenizers import TextTokenizer

LINE = {"context": "The cat sat on the", "choices": [" mat.", " moon over it."], "answer": 0}
QUESTIONS = [
    Question("The cat sat on the", (" mat.", " moon over it."), 0),
    Question("", ("é", "漢字", "c"), 2),
    Question("Two and two", (" is five", " is four"), 1),
]
SHAPE = RowShape(40, 4, 4, (3, 8, 8), (3, 8, 8))


def written(folder: Path, *lines: object) -> Path:
    path = folder / "choices.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def test_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, with blank lines, a byte order mark, other keys and empty contexts."""
    path = written(
        tmp_path, "\ufeff" + json.dumps(LINE), "", {"context": "", "choices": ["a", "b"], "answer": 1, "id": 7}
    )
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    for name in (path, "$SOMEWHERE/choices.jsonl"):
        assert read_choices(name) == [
            Question("The cat sat on the", (" mat.", " moon over it."), 0, f"{path}, line 1"),
            Question("", ("a", "b"), 1, f"{path}, line 3"),
        ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"context": ', "not JSON"),
        ("[1]", "got list, expected an object"),
        ({k: v for k, v in LINE.items() if k != "context"}, 'key "context" is missing'),
        ({k: v for k, v in LINE.items() if k != "choices"}, 'key "choices" is missing'),
        ({k: v for k, v in LINE.items() if k != "answer"}, 'key "answer" is missing'),
        (LINE | {"context": None}, 'key "context": got None, expected a text'),
        (LINE | {"choices": "ab"}, "key \"choices\": got 'ab', expected a list of texts"),
        (LINE | {"choices": ["a", 1]}, r"key \"choices\": got \['a', 1\], expected a list of texts"),
        (LINE | {"choices": ["a"]}, 'key "choices": got 1, expected at least two'),
        (LINE | {"choices": ["a", " "]}, "key \"choices\": number 1 is ' ', expected a text that is not empty"),
        (LINE | {"answer": 2}, 'key "answer": got 2, expected a number from 0 to 1'),
        (LINE | {"answer": -1}, 'key "answer": got -1, expected'),
        (LINE | {"answer": True}, 'key "answer": got True, expected'),
        (LINE | {"answer": "0"}, "key \"answer\": got '0', expected"),
    ],
)
def test_a_wrong_line_is_named(line: object, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"choices\.jsonl, line 3: {expected}"):
        read_choices(written(tmp_path, LINE, "", line, LINE))


def test_no_file_and_no_question_are_refused_before_anything_is_read(
    tmp_path: Path, tiny_data, tiny_module, attached
) -> None:
    with pytest.raises(ValueError, match=r"no choices file .*none\.jsonl"):
        tiny_data(choices={"cats": str(tmp_path / "none.jsonl")})
    with pytest.raises(ValueError, match=r"choices\.jsonl holds no question"):
        tiny_data(choices={"cats": str(written(tmp_path, ""))})
    with pytest.raises(ValueError, match=r"data.choices has the names \['tiles'\], which are corpora's"):
        attached(tiny_data(choices={"tiles": str(written(tmp_path, LINE))}), tiny_module())


def test_scored_are_the_choices_tokens_and_no_others(tmp_path: Path) -> None:
    """A tokenizer for which `ab` + `cd` together would be other tokens than apart."""
    merges = TextTokenizer.train(["abcd", "abcd bc", "bc bc bc bc"] * 5, 280, tmp_path)
    assert merges.encode("ab") + merges.encode("cd") != merges.encode("abcd")
    questions = [Question("ab", ("cd", "bc"), 0)]
    documents, cut = choice_documents(questions, merges, 40)
    assert cut == 0
    rows = ChoiceRows("q", iter(documents), SHAPE, 0, 0, 1)
    batch = rows.collate([rows[0]])
    for number, choice in enumerate(("cd", "bc")):
        labels = batch.text_labels[batch.choice_ids == number].tolist()
        assert labels == merges.encode(choice)
        at = batch.text_positions[batch.choice_ids == number]
        before = batch.token_ids.flatten()[at].tolist()
        assert before == [*merges.encode("ab")[-1:], *labels[:-1]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_choice_is_whole_in_one_row_and_labelled_once(ranks: int, byte_tokenizer) -> None:
    documents, _ = choice_documents(QUESTIONS, byte_tokenizer, SHAPE.seq_len)
    flat = [(q.context, choice) for q in QUESTIONS for choice in q.choices]
    found: dict[int, tuple[str, str]] = {}
    lengths = set()
    for rank in range(ranks):
        rows = ChoiceRows("q", iter(documents), SHAPE, 0, rank, ranks, batch_rows=2)
        lengths.add(len(rows))
        for first in range(0, len(rows), 2):
            batch = rows.collate([rows[first], rows[first + 1]])
            assert len(batch.text_labels) == len(batch.text_positions) == len(batch.choice_ids) == 256
            assert ((batch.text_labels == IGNORE_INDEX) == (batch.choice_ids < 0)).all()
            for number in set(batch.choice_ids.tolist()) - {-1}:
                assert number not in found
                mine = batch.choice_ids == number
                places = batch.text_positions[mine]
                row, end = int(places[0]) // SHAPE.seq_len, int(places[-1]) % SHAPE.seq_len + 2
                document = batch.document_ids[row, end - 1]
                ids = batch.token_ids[row][batch.document_ids[row] == document]
                assert ids[0] == BOS_ID
                assert int(batch.position_ids[row, end - 1]) == len(ids) - 1, "the whole document, from position 0"
                labels = batch.text_labels[mine].tolist()
                assert ids.tolist()[-len(labels) :] == labels
                found[number] = (byte_tokenizer.decode(ids[: -len(labels)]), byte_tokenizer.decode(labels))
    assert len(lengths) == 1 and lengths.pop() % 2 == 0, "whole batches on every rank"
    assert [found[number] for number in range(len(flat))] == flat
    empty = rows.collate([(9, []), (10, [])])
    assert (empty.choice_ids == -1).all() and (empty.text_labels == IGNORE_INDEX).all()


def test_a_long_context_loses_its_beginning_alike_for_all_choices(byte_tokenizer) -> None:
    questions = [Question("0123456789", (" a", " longer"), 0), Question("xyz", ("a", "b"), 1)]
    for seq_len, kept, cut in ((18, "0123456789", 0), (17, "123456789", 1), (9, "9", 1), (8, "", 1)):
        documents, number = choice_documents(questions, byte_tokenizer, seq_len)
        assert number == cut
        assert [byte_tokenizer.decode(d.elements[0]) for d in documents] == [kept, kept, "xyz", "xyz"]
        assert max(d.length(0) for d in documents) <= seq_len
    questions = [Question("0", ("a", " longer"), 0, "f.jsonl, line 4")]
    with pytest.raises(ValueError, match=r"f.jsonl, line 4: key \"choices\": number 1 has 7 .*to at least 8"):
        choice_documents(questions, byte_tokenizer, 7)


def test_a_choice_without_a_token_is_refused() -> None:
    inner = Tokenizer(models.WordLevel({"ab": 0}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("-")
    with pytest.raises(ValueError, match=r"f.jsonl, line 1: key \"choices\": number 1 has no token"):
        choice_documents([Question("ab", ("ab", "---"), 0, "f.jsonl, line 1")], TextTokenizer(inner), 9)


def test_cut_contexts_are_said_once_and_views_stay_what_they_were(
    tmp_path: Path, tiny_data, tiny_module, attached, caplog: pytest.LogCaptureFixture
) -> None:
    long = LINE | {"context": 70 * "x"}
    path = written(tmp_path, LINE, long, long)
    caplog.set_level(logging.WARNING)
    for rank in (0, 1):
        data = attached(tiny_data(choices={"cats": str(path)}, val_rows=2), tiny_module(), "validate", rank, 2)
        loaders = data.val_dataloader(), data.val_dataloader()
        assert data.val_views == ["lines", "tiles", "tiles/given_image"]
        assert list(data.questions) == ["cats"]
        assert len(loaders[0]) == 4
        plain = attached(tiny_data(val_rows=2), tiny_module(), "validate", rank, 2).val_dataloader()
        for one, other in zip(loaders[0], plain, strict=False):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a.token_ids, b.token_ids)
                assert torch.equal(a.noise, b.noise)
    said = "data.choices cats: the contexts of 2 of 3 questions are cut at their beginning to fit data.seq_len 64"
    assert caplog.text.count("are cut at their beginning") == 1
    assert said in caplog.text
