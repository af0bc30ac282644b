"""The same captioned pictures written in every format that a corpus of files may have."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage

S, N = 16, 12


def pixels(number: int) -> np.ndarray:
    """(S, S, 3): what decoding must give back; no two rows or columns alike."""
    return np.random.default_rng(number).integers(0, 256, (S, S, 3), np.uint8)


def png(number: int) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(pixels(number)).save(file, "PNG")
    return file.getvalue()


def captions(number: int) -> list[str]:
    """One to three, with characters that CSV, JSON and UTF-8 make something of."""
    return [f'caption {number}, "no. {n}" — é' for n in range(1 + number % 3)]


def write_pairs(folder: Path) -> None:
    for n in range(N):
        (folder / f"{n:02}.png").write_bytes(png(n))
        (folder / f"{n:02}.txt").write_text("\n".join(captions(n)) + "\n", encoding="utf-8")


def write_pictures(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    for n in range(N):
        (folder / place_of(n)).write_bytes(png(n))


def place_of(number: int) -> str:
    return f"deep/er/{number:02}.png" if number % 2 else f"{number:02}.png"


def write_jsonl(folder: Path) -> None:
    write_pictures(folder)
    lines = [json.dumps({"file_name": place_of(n), "text": captions(n)}) for n in range(N)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def write_csv(folder: Path) -> None:
    """A row a caption."""
    write_pictures(folder)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["file_name", "caption"], *([place_of(n), c] for n in range(N) for c in captions(n))])


def write_csv_outright(folder: Path) -> None:
    write_csv(folder)
    (folder / "metadata.csv").rename(folder / "train.csv")


def write_tar(folder: Path, kind: str) -> None:
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for n in range(shard * 6, shard * 6 + 6):
                text = "\n".join(captions(n)) if kind == "txt" else json.dumps({"captions": captions(n), "id": n})
                for name, data in ((f"a/{n:02}.png", png(n)), (f"a/{n:02}.{kind}", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_parquet(folder: Path, struct: bool) -> None:
    images = [{"bytes": png(n), "path": f"{n}.png"} if struct else png(n) for n in range(N)]
    columns = {"image": images, "captions": [captions(n) for n in range(N)], "even": [n % 2 == 0 for n in range(N)]}
    pq.write_table(pa.table(columns), folder / "all.parquet", row_group_size=5)


FORMATS = {
    "pairs": (write_pairs, "."),
    "jsonl": (write_jsonl, "."),
    "csv": (write_csv, "."),
    "csv named outright": (write_csv_outright, "train.csv"),
    "tar with txt": (lambda folder: write_tar(folder, "txt"), "*.tar"),
    "tar with json": (lambda folder: write_tar(folder, "json"), "."),
    "parquet": (lambda folder: write_parquet(folder, False), "all.parquet"),
    "parquet of structs": (lambda folder: write_parquet(folder, True), "."),
}


def as_is(pictures) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    return {p.key: (p.image.permute(1, 2, 0).numpy().tobytes(), p.captions) for p in pictures}
