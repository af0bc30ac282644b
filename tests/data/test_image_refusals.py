"""Corpora of pictures that are refused, and odd ones that are not."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.picture_folders import N, S, as_is, pixels, png, write_csv, write_pairs, write_tar
from tfusion.data.image_files import ImageFiles


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    write_pairs(folder)
    return folder


def test_names_that_are_no_utf8_and_links_in_circles(pairs: Path) -> None:
    name = os.fsencode(pairs) + b"/caf\xe9"
    try:
        Path(os.fsdecode(name + b".png")).write_bytes(png(50))
    except OSError:
        pytest.skip("the file system wants UTF-8")
    Path(os.fsdecode(name + b".txt")).write_text("coffee")
    (pairs / "loop").symlink_to(pairs, target_is_directory=True)
    found = as_is(ImageFiles(str(pairs), S, val_share=0).load("train"))
    assert len(found) == N + 1 and found["caf\\udce9"] == (pixels(50).tobytes(), ("coffee",))


BAD_INPUT = {
    "no/such/folder": "'no/such/folder' does not exist .*give the path of a folder or file, or a glob",
    "*.nothing": r"the glob '\*.nothing' matches no file",
    "empty": "the folder 'empty' holds no file",
    "unknown": r"is of no known format: 1 files .*\['.xyz'\]; expected metadata.jsonl or .*say which with a glob",
    "several": r"holds several formats \(tar, pairs\)",
    "metadata.csv": "metadata.csv has no column captions or caption or text; columns found: file_name, label. "
    "Say which with caption_column",
    "bad.parquet": "no column captions or caption or text; columns found: image, label",
    "path.parquet": "the column 'image' is of type string, expected the bytes of pictures",
    "lines.jsonl": "lines.jsonl has no line that can be read",
    (): "path is an empty list",
}


@pytest.mark.parametrize("path", BAD_INPUT)
def test_bad_input_is_told_of(tmp_path: Path, monkeypatch, path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "unknown", "several"):
        (tmp_path / name).mkdir()
    (tmp_path / "unknown" / "a.xyz").write_text("?")
    (tmp_path / "several" / "a.tar").write_bytes(b"")
    (tmp_path / "several" / "a.png").write_bytes(b"")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,3,and more\n")
    (tmp_path / "lines.jsonl").write_text("{\n")
    pq.write_table(pa.table({"image": [b"x"], "label": [1]}), tmp_path / "bad.parquet")
    pq.write_table(pa.table({"image": ["x.jpg"], "text": ["a"]}), tmp_path / "path.parquet")
    with pytest.raises(ValueError, match=BAD_INPUT[path]):
        ImageFiles(list(path) if path == () else path, S).load("train")


def test_settings_are_checked(pairs: Path, tmp_path: Path) -> None:
    for settings, words in [
        ({"image_size": 0}, "image_size 0"),
        ({"resize": "stretch"}, "resize 'stretch'"),
        ({"val_share": 1.0}, "val_share 1.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            ImageFiles(str(pairs), **({"image_size": S} | settings))
    for setting, value in (("where", {"a": 1}), ("caption_column", "c"), ("image_column", "i")):
        with pytest.raises(ValueError, match=f"{setting} needs columns, which pairs files do not have"):
            ImageFiles(str(pairs), S, **{setting: value}).load("train")
    csv_folder = tmp_path / "csv"
    csv_folder.mkdir()
    write_csv(csv_folder)
    with pytest.raises(ValueError, match="keeps no line .* columns found: file_name, caption"):
        ImageFiles(str(csv_folder), S, where={"lable": 1}).load("train")
    with pytest.raises(ValueError, match="no column words; columns found: file_name, caption"):
        ImageFiles(str(csv_folder), S, caption_column="words").load("train")


def test_a_shard_is_read_to_its_end(tmp_path: Path) -> None:
    """`tarfile` takes a broken header for the end: what follows would be lost unnoticed."""
    write_tar(tmp_path, "txt")
    data = bytearray((tmp_path / "0.tar").read_bytes())
    place = data.index(b"a/03.png")
    data[place + 150] ^= 0xFF  # in the checksum
    (tmp_path / "0.tar").write_bytes(data)
    corpus = ImageFiles(str(tmp_path), S, val_share=0)
    assert len(corpus.load("train")) == 3 + 6
    [bad] = corpus.tables()[0].bad
    assert (bad.cause, bad.file, bad.detail) == ("truncated shard", "0.tar", "a broken header after 'a/02'")


@pytest.mark.parametrize(
    "members", [["a.png", "a.mask.png", "a.txt"], ["a.jpg", "a.cls", "a.txt"], ["d/a.PNG", "d/a.TXT"]]
)
def test_other_members_of_a_shard_are_left_alone(tmp_path: Path, members: list[str]) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for n, name in enumerate(members):
            data = b"words" if name.lower().endswith("txt") else png(n)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    corpus = ImageFiles(str(tmp_path), S, val_share=0)
    assert [data for data, _ in as_is(corpus.load("train")).values()] == [pixels(0).tobytes()]
    assert corpus.tables()[0].bad == []
