"""Bad records: each kind is handled or skipped and named, shares are exact, and a run says what it will not take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.bad_files import SIZE, colors, encode, make_bad_folder, table, what_happened
from tfusion.data.bad_records import BadRecords
from tfusion.data.image_files import ImageFiles
from tfusion.data.records import BadRecord
from tfusion.data.text_files import TextFiles

# What must become of each record of `make_bad_folder`: its notes, or, with an exclamation mark, why it is skipped.
EXPECTED = {
    "pictures/plain.jpg": "as it is",
    "pictures/alpha.png": "alpha",
    "pictures/palette.png": "palette",
    "pictures/sixteen.png": "16 bit",
    "pictures/cmyk.jpg": "CMYK",
    "pictures/turned.jpg": "EXIF rotation",
    "pictures/animated.gif": "animation: first frame, palette",
    "pictures/really_jpeg.png": "wrong extension: JPEG as .png",
    "pictures/truncated.jpg": "!truncated picture",
    "pictures/broken.png": "!broken picture",
    "pictures/zero.jpg": "!zero bytes",
    "pictures/text.jpg": "!not a picture",
    "pictures/bomb.png": "!pixel bomb",
    "pictures/float.tif": "!floating-point picture",
    "pictures/no_caption.jpg": "!no caption",
    "pictures/empty_caption.jpg": "!no caption",
    "pictures/enormous_caption.jpg": "!enormous caption",
    "pictures/latin.txt": "!not UTF-8",
    "pictures/twice.jpg": "as it is",
    "pictures/twice.png": "!duplicate key",
    "pictures/alone.txt": "!no picture",
    "pictures/link.jpg": "!no picture",
    "shards/a.tar/no_picture": "!no picture",
    "shards/a.tar/bare": "!no caption",
    "shards/a.tar/json": "!no caption",
    "shards/a.tar/bad_json": "!unreadable line",
    "shards/a.tar/plain": "!duplicate key",
    "shards/b.tar/first": "as it is",
    "shards/b.tar/last": "!truncated shard",
    "texts/bom.txt": "as it is",
    "texts/latin.txt": "!not UTF-8",
    "texts/zero.txt": "!zero bytes",
    "texts/blank.txt": "!empty text",
    "texts/zero.jsonl": "!zero bytes",
    "texts/broken.parquet": "!broken parquet",
    "texts/lines.jsonl:1": "as it is",
    "texts/lines.jsonl:2": "!unreadable line",
    "texts/lines.jsonl:3": "!no text",
    "texts/lines.jsonl:4": "!no text",
    "texts/lines.jsonl:5": "!no text",
    "texts/lines.jsonl:6": "!not UTF-8",
    "texts/lines.jsonl:7": "!not UTF-8",
    "texts/lines.jsonl:8": "!unreadable line",
    "texts/lines.jsonl:9": "!empty text",
}
# Of the shards, keys stand in the file of their name; the rest are told by file alone.
FILE_OF_KEY = {"shards": lambda name: name.split("/")[0], "texts": lambda name: name.split(":")[0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    make_bad_folder(path)
    return path


def test_each_kind_is_used_or_skipped_as_it_should(tmp_path: Path) -> None:
    kinds = make_bad_folder(tmp_path)
    happened = what_happened(tmp_path)
    assert set(kinds) == set(happened) == set(EXPECTED)
    for name, expected in EXPECTED.items():
        words = f"skipped: {expected[1:]}" if expected.startswith("!") else f"used ({expected})"
        assert happened[name] == words or happened[name].startswith(words + " ("), (name, happened[name])
    rows = table(kinds, happened).splitlines()
    assert len(rows) == len(kinds) + 2 and all(row.count("|") == 4 for row in rows)


@pytest.mark.parametrize("name", ["pictures", "shards", "texts"])
def test_counted_and_named_with_file_and_key(folder: Path, name: str) -> None:
    corpus = TextFiles(str(folder / name)) if name == "texts" else ImageFiles(str(folder / name), SIZE)
    [read] = corpus.tables()
    expected = []
    for place, what in EXPECTED.items():
        record = place.removeprefix(f"{name}/")
        if place.startswith(f"{name}/") and what.startswith("!"):
            key = record.rsplit(".", 1)[0] if name == "pictures" else record
            expected.append((name, what[1:], FILE_OF_KEY.get(name, str)(record), key))
    assert sorted((b.corpus, b.cause, b.file, b.key) for b in read.bad) == sorted(expected)
    used = [place for place, what in EXPECTED.items() if place.startswith(f"{name}/") and not what.startswith("!")]
    extra = 1 if name == "shards" else 0  # the first of the two of one key
    assert len(read.rows) == len(used) + extra


@pytest.mark.parametrize("total", [100, 300, 1000])
@pytest.mark.parametrize("percent", [1, 7, 14, 29, 57, 58])
def test_the_share_is_exact(total: int, percent: int) -> None:
    allowed = total * percent // 100
    for count in (allowed, allowed + 1):
        found = BadRecords(percent / 100)
        found.add([BadRecord("own", "cause", "file", str(n)) for n in range(count)], "own", total)
        if count == allowed:
            found.check()
        else:
            with pytest.raises(ValueError, match=f"{count} of {total} records are bad"):
                found.check()


def _pairs(folder: Path, good: int, bad: int) -> str:
    folder.mkdir(exist_ok=True)
    for n in range(good + bad):
        picture = encode(colors(n, SIZE), "PNG")
        (folder / f"{n:03}.png").write_bytes(picture if n < good else picture[:100])
        (folder / f"{n:03}.txt").write_text(f"number {n}")
    return str(folder)


def test_a_run_takes_the_share_and_not_one_more(tmp_path: Path, attached, tiny_module, tiny_data) -> None:
    def start(path: str, **settings):
        data = tiny_data(image_corpora=[ImageFiles(path, 8)], text_corpora=[], **settings)
        return attached(data, tiny_module())

    path = _pairs(tmp_path / "own", 99, 1)
    data = start(path)
    assert [(r.corpus, r.cause, r.file, r.key) for r in data.bad_records.records] == [
        ("own", "truncated picture", "099.png", "099")
    ]
    assert data.bad_records.totals["own"] == 100
    (tmp_path / "own" / "000.txt").write_text("")
    with pytest.raises(ValueError) as caught:
        start(path)
    words = str(caught.value)
    for part in (
        "corpus 'own': 2 of 100 records are bad (2.00%), data.max_bad_share allows 1.00%:",
        "1 x truncated picture: 099.png (OSError: ",
        "1 x no caption: 000.png",
        "raise data.max_bad_share",
    ):
        assert part in words, words
    assert len(start(path, max_bad_share=0.02).bad_records) == 2


def test_captions_longer_than_a_row_count_too(tmp_path: Path, attached, tiny_module, tiny_data) -> None:
    path = _pairs(tmp_path / "own", 20, 0)
    (tmp_path / "own" / "003.txt").write_text("x" * 57)  # 4 patches, 4 marks and 57 bytes: one more than 64
    (tmp_path / "own" / "004.txt").write_text("x" * 56)
    with pytest.raises(ValueError, match=r"1 x caption longer than a row: 003.png \(57 tokens, .* room for 56\)"):
        attached(tiny_data(image_corpora=[ImageFiles(path, 8, val_share=0)], text_corpora=[]), tiny_module())
    corpus = ImageFiles(path, 8, val_share=0)
    data = attached(tiny_data(image_corpora=[corpus], text_corpora=[], max_bad_share=0.05), tiny_module())
    assert len(data.mixture.images.pictures) == 19
    for n in range(20):
        (tmp_path / "own" / f"{n:03}.txt").write_text("x" * 57)
    settings = {"image_corpora": [ImageFiles(path, 8, val_share=0)], "text_corpora": [], "max_bad_share": 1.0}
    with pytest.raises(ValueError, match="'own': no caption fits a row of data.seq_len 64: raise(?s:.*)57 tokens"):
        attached(tiny_data(**settings), tiny_module())


def test_a_summary_names_three_of_each_cause_and_the_file_all(tmp_path: Path) -> None:
    found = BadRecords(0.5)
    found.add([BadRecord("own", "zero bytes", f"{n}.png", f"{n}") for n in range(5)], "own", 100)
    found.add([BadRecord("own", "no text", "a.jsonl", "a.jsonl:7", "detail é")], "own")
    found.add([BadRecord("other", "no text", "shard.tar", "k")], "other", 3)
    assert found.summary("own").splitlines() == [
        "  5 x zero bytes: 0.png; 1.png; 2.png",
        "  1 x no text: a.jsonl, a.jsonl:7 (detail é)",
    ]
    assert list(found.by_cause()) == ["zero bytes", "no text"] and len(found) == 7
    found.write(tmp_path / "bad.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 7
    assert rows[5] == {"corpus": "own", "cause": "no text", "file": "a.jsonl", "key": "a.jsonl:7", "detail": "detail é"}
