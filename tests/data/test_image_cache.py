"""Pictures are read once and then mapped: by whom, from where, and when again."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image as PILImage

from tests.data.picture_folders import N, S, as_is, pixels, png, write_csv_outright, write_pairs
from tfusion.data import image_files, record_builder, records
from tfusion.data.image_files import ImageFiles


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    write_pairs(folder)
    return folder


def test_two_folders_of_the_same_names_sizes_and_times(tmp_path: Path) -> None:
    for folder, color in (("one", b"\0"), ("two", b"\xff")):
        (tmp_path / folder).mkdir()
        image = PILImage.frombytes("RGB", (S, S), color * 3 * S * S)
        image.save(tmp_path / folder / "a.bmp")
        (tmp_path / folder / "a.txt").write_text("flat")
        for name in ("a.bmp", "a.txt"):
            os.utime(tmp_path / folder / name, (10**9, 10**9))
    means = [
        [p.image.float().mean().item() for p in ImageFiles(str(tmp_path / f), S, val_share=0, name="x").load("train")]
        for f in ("one", "two")
    ]
    assert means == [[0.0], [255.0]]


def refuse(*_: object) -> None:
    raise AssertionError("read again")


def test_the_second_load_maps_the_cache(pairs: Path, monkeypatch) -> None:
    first = as_is(ImageFiles(str(pairs), S).load("train"))
    with monkeypatch.context() as patched:
        patched.setattr(record_builder, "_read_all", refuse)
        corpus = ImageFiles(str(pairs), S, name="renamed", val_share=0.05)
        assert as_is(corpus.load("train")) == first
        files = [entry["filename"] for entry in corpus.tables()[0].dataset.cache_files]
        assert files and all(os.environ["TFUSION_CACHE"] in file for file in files)
        buffer = corpus.tables()[0].column("pixels").chunk(0).buffers()[2]
        assert pa.total_allocated_bytes() < buffer.size or not buffer.is_mutable
    (pairs / "00.png").write_bytes(png(99))
    assert pixels(99).tobytes() in {
        data for data, _ in as_is(ImageFiles(str(pairs), S, val_share=0).load("train")).values()
    }
    stat = (pairs / "01.txt").stat()
    (pairs / "01.txt").write_text("A" * stat.st_size)
    os.utime(pairs / "01.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert ("A" * stat.st_size,) in {c for _, c in as_is(ImageFiles(str(pairs), S, val_share=0).load("train")).values()}


def test_pictures_of_metadata_named_outright_are_watched(tmp_path: Path) -> None:
    write_csv_outright(tmp_path)
    path = str(tmp_path / "train.csv")
    ImageFiles(path, S, val_share=0).load("train")
    (tmp_path / "00.png").write_bytes(png(99))
    assert pixels(99).tobytes() in {data for data, _ in as_is(ImageFiles(path, S, val_share=0).load("train")).values()}


def test_processes_change_nothing(pairs: Path, monkeypatch) -> None:
    def read(processes: int | None):
        monkeypatch.setattr(records, "_num_processes", lambda units, size: processes)
        (pairs / "00.txt").touch()  # read again
        return ImageFiles(str(pairs), S, val_share=0).load("train")

    alone, together = read(None), read(3)
    assert list(as_is(alone).items()) == list(as_is(together).items())
    assert alone.content == together.content
    assert len(together.table.dataset.cache_files) == 3


def test_a_process_for_each_32_mb(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    megabyte = 2**20
    assert records._num_processes(700, 7000 * megabyte) == 8, "many shards"
    assert records._num_processes(3, 7000 * megabyte) == 3
    assert records._num_processes(500, 65 * megabyte) == 2
    assert records._num_processes(500, megabyte) is None


def _slow_read(unit, options):
    time.sleep(0.05)
    yield from image_files.read_pictures(unit, options)


def _prepare(path: str, slow: bool) -> None:
    if slow:
        _slow_read.__name__ = "read_pictures"
        original = image_files.build_table
        image_files.build_table = lambda reader, *rest: original(_slow_read, *rest)
    ImageFiles(path, S).prepare()


def _start(pairs: Path, slow: bool) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=_prepare, args=(str(pairs), slow))
    process.start()
    return process


@pytest.mark.multi
@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_killed_or_beside_another_it_is_whole_in_the_end(pairs: Path) -> None:
    killed = _start(pairs, slow=True)
    time.sleep(0.4)
    assert killed.is_alive()
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    both = [_start(pairs, slow=True), _start(pairs, slow=True)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    found = as_is(ImageFiles(str(pairs), S, val_share=0).load("train"))
    assert {data for data, _ in found.values()} == {pixels(n).tobytes() for n in range(N)}


def test_what_is_sent_to_a_process_is_small(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    large = ImageFiles(str(tmp_path), 256, val_share=0).load("train")  # 2.3 MB of pixels
    sent = pickle.dumps(large)
    assert len(sent) < 50_000
    assert as_is(pickle.loads(sent)) == as_is(large)
