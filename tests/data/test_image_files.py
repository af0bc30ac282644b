"""Pictures in a user's files: the same records in every format, their splits, captions and sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from tests.data.picture_folders import (
    FORMATS,
    N,
    S,
    as_is,
    captions,
    pixels,
    place_of,
    png,
    write_jsonl,
    write_pairs,
    write_parquet,
    write_pictures,
)
from tfusion.data import record_builder
from tfusion.data.image_files import ImageFiles
from tfusion.data.mixture import CaptionedDocuments
from tfusion.data.sources import load_split
from tfusion.data.validation import caption_documents


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    write_pairs(folder)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_all_formats_give_the_same(tmp_path: Path, name: str) -> None:
    write, path = FORMATS[name]
    write(tmp_path)
    (tmp_path / ".hidden.txt").write_text("left out")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.png").write_bytes(b"left out")
    corpus = ImageFiles(str(tmp_path / path), S, val_share=0.0, name="own")
    pictures = corpus.load("train")
    assert corpus.tables()[0].bad == []
    expected = {(pixels(n).tobytes(), tuple(captions(n))) for n in range(N)}
    found = as_is(pictures)
    assert len(pictures) == len(found) == N and set(found.values()) == expected
    assert not any(str(tmp_path) in key for key in found), "keys say nothing of where the folder lies"


def test_where_keeps_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path, False)
    found = as_is(ImageFiles(str(tmp_path), S, val_share=0.0, where={"even": True}).load("train"))
    assert sorted(captions[0] for _, captions in found.values()) == sorted(captions(n)[0] for n in range(0, N, 2))
    assert "all.parquet:2" in found and "all.parquet:1" not in found
    folder = tmp_path / "csv"
    folder.mkdir()
    write_pictures(folder)
    rows = "".join(f"{place_of(n)},caption,{n % 2 == 0}\n" for n in range(N))
    (folder / "metadata.csv").write_text("file_name,text,even\n" + rows)
    corpus = ImageFiles(str(folder), S, val_share=0.0, where={"even": True})
    assert sorted(as_is(corpus.load("train"))) == [place_of(n) for n in range(0, N, 2)] and corpus.tables()[0].bad == []


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_bad_pictures_of_metadata_are_named_with_its_line(tmp_path: Path, kind: str) -> None:
    write_pictures(tmp_path)
    (tmp_path / place_of(2)).write_bytes(b"no picture")
    (tmp_path / place_of(4)).unlink()
    lines = [(place_of(n), "" if n == 6 else "a caption") for n in range(N)] + [(place_of(2), "again")]
    if kind == "jsonl":
        rows = "".join(json.dumps({"file_name": place, "text": text}) + "\n" for place, text in lines)
    else:
        rows = "file_name,text\n" + "".join(f"{place},{text}\n" for place, text in lines)
    (tmp_path / f"metadata.{kind}").write_text(rows)
    corpus = ImageFiles(str(tmp_path), S, val_share=0.0)
    assert len(corpus.load("train")) == N - 3
    found = {record.file: record.detail for record in corpus.tables()[0].bad}
    first = 1 if kind == "jsonl" else 2
    assert set(found) == {place_of(n) for n in (2, 4, 6)}
    line = f"metadata.{kind} line {{}}".format
    assert found[place_of(4)] == f"FileNotFoundError: No such file or directory ({line(4 + first)})"
    for n in (2, 6):
        assert found[place_of(n)] == line(n + first)  # nothing else is to be said of it


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_pictures_are_brought_to_size(tmp_path: Path, resize: str) -> None:
    y, x = np.mgrid[:64, :96]
    wide = PILImage.fromarray(np.stack([x * 2, y * 3, x + y], -1).astype(np.uint8))
    wide.save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("wide")
    [picture] = ImageFiles(str(tmp_path), 32, resize=resize, val_share=0).load("train")
    by_hand = wide.crop((16, 0, 80, 64)) if resize == "crop" else wide
    expected = np.asarray(by_hand.resize((32, 32), PILImage.Resampling.LANCZOS)).astype(int)
    assert np.abs(picture.image.permute(1, 2, 0).numpy() - expected).max() <= 4


def test_each_epoch_draws_a_caption_and_mirrors_half_if_asked(pairs: Path, byte_tokenizer) -> None:
    for flip in (False, True):
        corpus = ImageFiles(str(pairs), S, flip=flip, val_share=0.0)
        pictures = corpus.load("train")
        documents = CaptionedDocuments(pictures, byte_tokenizer, 7, 1.0, 0.0, 1.0)
        seen: list[set[str]] = [set() for _ in pictures]
        mirrored = 0
        for epoch in range(40):
            for index in range(N):
                text, image = documents.get(epoch, index).elements
                seen[index].add(byte_tokenizer.decode(text))
                found = image.data.permute(1, 2, 0).numpy()
                number = int(pictures[index].key)
                assert (found == pixels(number)).all() or (found == pixels(number)[:, ::-1]).all()
                mirrored += int((found != pixels(number)).any())
        assert [sorted(s) for s in seen] == [captions(int(p.key)) for p in pictures]
        assert (0.4 < mirrored / (40 * N) < 0.6) if flip else mirrored == 0
        again = CaptionedDocuments(
            ImageFiles(str(pairs), S, flip=flip, val_share=0.0).load("train"), *_settings(documents)
        )
        assert all(_same(again.get(3, i), documents.get(3, i)) for i in reversed(range(N)))
        for document, picture in zip(caption_documents(pictures, byte_tokenizer, False, N), pictures, strict=True):
            assert (document.elements[1].data == picture.image).all(), "validation mirrors nothing"


def _settings(documents: CaptionedDocuments) -> tuple:
    return documents.tokenizer, documents.seed, documents.caption_first, documents.caption_drop, 1.0


def _same(a, b) -> bool:
    return a.elements[0] == b.elements[0] and bool((a.elements[1].data == b.elements[1].data).all())


def test_the_split_goes_by_key_and_stays(pairs: Path, tmp_path: Path) -> None:
    def split(folder: Path, share: float = 0.3) -> tuple[set[str], set[str]]:
        corpus = ImageFiles(str(folder), S, val_share=share)
        return set(as_is(corpus.load("train"))), set(as_is(corpus.load("val")))

    train, val = split(pairs)
    assert not train & val and len(train | val) == N and val
    for n in range(N, 3 * N):
        (pairs / f"{n:02}.png").write_bytes(png(n))
        (pairs / f"{n:02}.txt").write_text("more")
    more_train, more_val = split(pairs)
    assert train <= more_train and val <= more_val and len(more_val) > len(val)
    moved = tmp_path / "elsewhere" / "other name"
    shutil.copytree(pairs, moved)
    assert split(moved) == (more_train, more_val)
    assert len(split(pairs, 1e-9)[1]) == 1, "one at least"
    corpus = ImageFiles(str(pairs), S)
    with pytest.raises(ValueError, match=r"'pairs' has no document in its split 'test'"):
        load_split(corpus, "test")
    with pytest.raises(ValueError, match="split 'val'"):
        load_split(ImageFiles(str(pairs), S, val_share=0), "val")


def test_a_globs_keys_do_not_change_with_what_it_finds(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(1))
        (tmp_path / name / "1.txt").write_text(name)
        found = set(as_is(ImageFiles(str(tmp_path / "*" / "*"), S, val_share=0).load("train")))
        assert "a/1" in found, found


def test_separate_validation_pictures(pairs: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held out"
    held_out.mkdir()
    write_jsonl(held_out)
    corpus = ImageFiles(str(pairs), S, val=str(held_out))
    assert len(corpus.load("train")) == N
    assert set(as_is(corpus.load("val"))) == {place_of(n) for n in range(N)}
    assert len(corpus.tables()) == 2
    with pytest.raises(ValueError, match="13 files of val .* are also in path .* would be trained on"):
        ImageFiles(str(tmp_path / "*" / "**"), S, val=str(held_out)).tables()
    assert len(ImageFiles(str(held_out), S, val=str(held_out)).tables()) == 2, "on purpose"


def test_long_captions_are_dropped_as_one_by_one(tmp_path: Path, monkeypatch) -> None:
    draws = np.random.default_rng(0)
    lists = [["x" * int(n) for n in draws.integers(1, 40, draws.integers(1, 4))] for _ in range(60)]
    columns = {"image": [png(n % 3) for n in range(60)], "captions": [c if n % 7 else [] for n, c in enumerate(lists)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    monkeypatch.setattr(record_builder, "MOST_RECORDS_A_WRITE", 8)  # many parts in the table
    pictures = ImageFiles(str(tmp_path), S, val_share=0.2).load("train")
    asked: list[str] = []

    def count(captions: list[str]) -> list[int]:
        asked.extend(captions)
        return list(map(len, captions))

    short, bad = pictures.drop_long_captions(30, count)
    fitting = {p.key: tuple(c for c in p.captions if len(c) <= 30) for p in pictures}
    assert {p.key: p.captions for p in short} == {key: kept for key, kept in fitting.items() if kept}
    assert sorted(record.key for record in bad) == sorted(key for key, kept in fitting.items() if not kept) != []
    assert all(record.cause == "caption longer than a row" and "room for 30" in record.detail for record in bad)
    assert all(record.file == "a.parquet" for record in bad)
    assert short.content != pictures.content
    assert len(asked) < sum(len(p.captions) for p in pictures), "short ones are not counted"
