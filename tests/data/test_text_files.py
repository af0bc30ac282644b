"""Texts in a user's files: what each format gives, byte for byte, what is skipped, and how they are cut."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tfusion.data import Shakespeare, record_builder, text_records
from tfusion.data.sources import load_split
from tfusion.data.text_files import TextFiles
from tfusion.data.text_pieces import BEGINNING, TextPieces
from tfusion.tokenizers.text import TextTokenizer

TEXTS = [f'Text {n}.\n\nIt has é, 漢 and 😀, a \t tab\r\nand "quotes" {"more " * n}' for n in range(20)]


def read(path: Path, **settings) -> tuple[list[str], list[tuple[str, str, str]]]:
    """All texts, and (cause, key, detail) of the bad records."""
    corpus = TextFiles(str(path), val_share=0.0, **settings)
    texts = corpus.load("train")
    return list(texts), [(bad.cause, bad.key, bad.detail) for bad in corpus.tables()[0].bad]


def write_txt(folder: Path) -> None:
    (folder / "deep").mkdir()
    for n, text in enumerate(TEXTS):
        (folder / ("deep" if n > 9 else "") / f"{n:02}.txt").write_bytes(text.encode())


def write_jsonl(folder: Path, column: str = "text") -> None:
    lines = [json.dumps({"id": n, column: text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("\n\n".join(lines), encoding="utf-8-sig")


def write_parquet(folder: Path) -> None:
    for name, part in (("a", TEXTS[:9]), ("b", TEXTS[9:])):
        pq.write_table(pa.table({"id": range(len(part)), "text": part}), folder / f"{name}.parquet", row_group_size=4)


@pytest.mark.parametrize("write", [write_txt, write_jsonl, write_parquet])
def test_all_formats_give_the_same(tmp_path: Path, write) -> None:
    write(tmp_path)
    (tmp_path / "notes.md").write_text("left out")
    (tmp_path / ".hidden.txt").write_text("left out")
    texts, bad = read(tmp_path)
    assert sorted(texts) == sorted(TEXTS) and bad == []
    assert write is write_txt or texts == TEXTS


def test_formats_side_by_side_and_another_column(tmp_path: Path) -> None:
    write_txt(tmp_path)
    write_jsonl(tmp_path)
    write_parquet(tmp_path)
    assert sorted(read(tmp_path)[0]) == sorted(TEXTS * 3)
    other = tmp_path / "other"
    other.mkdir()
    write_jsonl(other, "body")
    assert read(other, column="body")[0] == TEXTS
    (other / "a.jsonl").unlink()
    write_jsonl(other, "content")
    assert read(other)[0] == TEXTS


def test_odd_texts(tmp_path: Path) -> None:
    good = "é\r\nend"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + good.encode())
    (tmp_path / "b.txt").write_bytes(b"12345\xff")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf12345\xff")
    (tmp_path / "d.txt").write_bytes(b"")
    (tmp_path / "e.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "f.txt").write_bytes(" \n\u2003".encode())
    (tmp_path / "g.txt").write_bytes("utf-16".encode("utf-16"))
    (tmp_path / "h.txt").symlink_to(tmp_path / "nowhere.txt")
    texts, bad = read(tmp_path)
    assert texts == [good]
    assert bad == [
        ("not UTF-8", "b.txt", "byte 6"),
        ("not UTF-8", "c.txt", "byte 9"),
        ("zero bytes", "d.txt", ""),
        ("empty text", "e.txt", ""),
        ("empty text", "f.txt", ""),
        ("not UTF-8", "g.txt", "byte 1"),
        ("unreadable file", "h.txt", "FileNotFoundError: No such file or directory"),
    ]


@pytest.mark.parametrize("part", [1, 2, 3, 5, 7, 64])
@pytest.mark.parametrize(
    "text",
    ["漢😀é" * 40, "".join(TEXTS), "a\n" * 50, "é" * 64, "\r".join(TEXTS)],
    ids=["wide", "texts", "short lines", "two bytes", "old Mac"],
)
def test_a_long_file_becomes_several_texts_without_loss(tmp_path: Path, monkeypatch, part: int, text: str) -> None:
    monkeypatch.setattr(text_records, "PART_BYTES", part)
    (tmp_path / "a.txt").write_bytes(text.encode())
    texts, bad = read(tmp_path)
    blank = [b for b in bad if b[0] == "empty text"]
    assert bad == blank, "no character is cut"
    assert "".join("".join(texts).split()) == "".join(text.split())
    assert blank or "".join(texts) == text
    assert len(texts) + len(blank) > 1 or len(text.encode()) <= 2 * part
    assert all(t.endswith("\n") or len(t.encode()) >= 2 * part or t is texts[-1] for t in texts)


def test_a_byte_that_is_wrong_in_a_later_part(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(text_records, "PART_BYTES", 10)
    lines = [b"line of 15 byt\n"] * 4
    lines[2] = b"line \xff 15 bytes\n"
    (tmp_path / "a.txt").write_bytes(b"".join(lines))
    texts, bad = read(tmp_path)
    assert texts == ["line of 15 byt\n"] * 3
    assert bad == [("not UTF-8", "a.txt#2", "byte 36")]
    (tmp_path / "a.txt").write_bytes(b"\x80" * 100)
    assert read(tmp_path)[0] == [], "continuation bytes without end are no reason to read on"


def test_lines_that_are_wrong(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(text_records, "MOST_LINE_BYTES", 100)
    lines = [
        b'{"text": "one"}',
        b"{",
        b'{"title": "x"}',
        b'{"text": null}',
        b'{"text": ["x"]}',
        b"",
        b'{"text": "\\ud800"}',
    ]
    lines += [b'{"text": "' + b"x" * 1000 + b'"}', b'{"text": "caf\xe9"}', b"[" * 50, b'{"text": "last"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    texts, bad = read(tmp_path)
    assert texts == ["one", "last"]
    assert [(cause, key) for cause, key, _ in bad] == [
        ("unreadable line", "a.jsonl:2"),
        ("no text", "a.jsonl:3"),
        ("no text", "a.jsonl:4"),
        ("no text", "a.jsonl:5"),
        ("not UTF-8", "a.jsonl:7"),
        ("enormous text", "a.jsonl:8"),
        ("not UTF-8", "a.jsonl:9"),
        ("unreadable line", "a.jsonl:10"),
    ]
    assert "byte 14" in bad[6][2]
    (tmp_path / "a.jsonl").write_bytes(b'{"meta": 1}\n{"text": "the first line has none"}\n')
    assert read(tmp_path)[0] == ["the first line has none"]
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 200)
    assert len(read(tmp_path)[1]) == 200


def test_a_broken_page_of_parquet_costs_its_row_group(tmp_path: Path) -> None:
    rows = [f"row {n} " + "x" * 50 for n in range(40)]
    pq.write_table(
        pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=10, compression="NONE", use_dictionary=False
    )
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    header = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0).data_page_offset
    data[header : header + 16] = b"\xff" * 16
    (tmp_path / "a.parquet").write_bytes(data)
    texts, bad = read(tmp_path)
    assert texts == rows[:10] + rows[20:]
    assert [(cause, key) for cause, key, _ in bad] == [("broken parquet", f"a.parquet:{n}") for n in range(10, 20)]


def test_a_single_text_is_split_without_loss_or_overlap(tmp_path: Path) -> None:
    for text in ("".join(f"line {n} é漢\n" for n in range(100)), "漢" * 101):
        (tmp_path / "a.txt").write_bytes(text.encode())
        for share in (0.05, 0.1, 0.5):
            corpus = TextFiles(str(tmp_path), val_share=share)
            [train], [val] = corpus.load("train"), corpus.load("val")
            assert train + val == text
            assert share / 2 < len(val) / len(text) < 2 * share
            assert "\n" not in text or train.endswith("\n")
            with pytest.raises(ValueError, match="no document in its split 'test'"):
                load_split(corpus, "test")


def test_splits_go_by_key(tmp_path: Path) -> None:
    write_jsonl(tmp_path)
    corpus = TextFiles(str(tmp_path), val_share=0.3)
    train, val = list(corpus.load("train")), list(corpus.load("val"))
    assert sorted(train + val) == sorted(TEXTS) and len(val) > 1
    with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f'\n{{"text": "more {n}"}}' for n in range(50))
    longer = TextFiles(str(tmp_path), val_share=0.3)
    assert set(train) < set(longer.load("train")) and set(val) < set(longer.load("val"))


def test_pieces_put_together_are_the_text(tmp_path: Path, byte_tokenizer) -> None:
    write_txt(tmp_path)
    (tmp_path / "long.txt").write_bytes(("".join(TEXTS) * 5).encode())
    texts = TextFiles(str(tmp_path), val_share=0).load("train")
    for most in (30, 100, 1000):
        pieces = TextPieces([texts, TEXTS], byte_tokenizer, most)
        documents = [pieces[n] for n in range(len(pieces))]
        found, parts = [], []
        for number, document in enumerate(documents):
            [ids] = document.elements
            assert len(ids) <= max(most, 4)
            assert document.bos == (parts == [])
            parts.append(byte_tokenizer.decode(ids))
            if document.eos:
                assert document.next_id is None
                found.append("".join(parts))
                parts = []
            else:
                assert document.next_id == documents[number + 1].elements[0][0]
        assert found == [*texts, *TEXTS]
        assert pieces.sizes[0] + pieces.sizes[1] == len(pieces)
        assert most < 1000 or pieces.sizes[1] == len(TEXTS)


def test_of_the_next_piece_only_the_beginning_is_encoded(cache_folder: None, monkeypatch) -> None:
    texts = Shakespeare().load("val")
    tokenizer, given = TextTokenizer.train(texts, 1024), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: given.append(len(text.encode())) or encode(text))
    pieces = TextPieces([texts], tokenizer, 1000)
    documents = [pieces[n] for n in range(len(pieces))]
    whole = sum(len(text.encode()) for text in texts)
    assert len(documents) > 100 and whole < sum(given) <= whole + BEGINNING * len(documents)
    for document, following in itertools.pairwise(documents):
        assert document.next_id == (None if document.eos else following.elements[0][0])


def test_texts_lie_on_disk(tmp_path: Path, monkeypatch) -> None:
    """Neither loading nor a text's bytes nor a pickle copies them."""
    (tmp_path / "a.txt").write_bytes(b"a line of a large text\n" * 400_000)  # 9 MB
    (tmp_path / "b.txt").write_bytes(b"small\n")
    TextFiles(str(tmp_path), val_share=0).prepare()
    before = pa.total_allocated_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(record_builder, "_read_all", lambda **_: pytest.fail("read again"))
        texts = TextFiles(str(tmp_path), val_share=0).load("train")
    views = [texts.utf8(n) for n in range(2)]
    assert pa.total_allocated_bytes() - before < 100_000
    assert list(texts.sizes()) == [len(view) for view in views] == [9_200_000, 6]
    assert os.environ["TFUSION_CACHE"] in texts.table.dataset.cache_files[0]["filename"]
    assert len(pickle.dumps(texts)) < 20_000


def test_small_texts_are_written_together_and_large_ones_apart(tmp_path: Path, monkeypatch) -> None:
    """In memory there is never more than a part; and few parts, for a table of very many is slow."""
    monkeypatch.setattr(record_builder, "BYTES_A_WRITE", 100_000)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n' * 3000)
    for n in range(4):
        (tmp_path / f"large{n}.txt").write_text("x" * 90_000)
    (tmp_path / "z.jsonl").write_text('{"text": "short"}\n' * 3000)
    texts = TextFiles(str(tmp_path), val_share=0).load("train").table.column("text")
    assert [len(part) for part in texts.chunks] == [3001, 2, 2001, 1000]


BAD_INPUT = {
    "nothing": "'nothing' does not exist",
    "*.json": "the glob .* matches no file",
    "empty": "holds no file",
    "other": r"no text in 1 files .*\['.md'\]; expected .txt, .jsonl or .parquet",
    "a.jsonl": "a.jsonl has no column text or content; columns found: body, id. Say which with column",
    "a.parquet": "a.parquet has no column text or content; columns found: body",
}


@pytest.mark.parametrize("path", BAD_INPUT)
def test_bad_input_is_told_of(tmp_path: Path, monkeypatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.md").write_text("?")
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"id": 3}\n')
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=BAD_INPUT[path]):
        TextFiles(path).load("train")
