"""A latent cache is the corpus it was made of, with latents in place of pixels; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import IMAGE_SIZE, TinyPictures
from tests.data.latent_caches import LATENT_SHAPE, Broken, Halves, Tiles, cache, encode, one_by_one, save_autoencoder
from tests.data.picture_folders import S, write_pairs
from tfusion.data import ImageFiles, Latents
from tfusion.data.checks import check_together
from tfusion.data.encoded import check_latents, check_not_mixed
from tfusion.data.latent_shards import KEY, clear_unfinished, read_info, write_shard
from tfusion.data.mixture import CaptionedDocuments
from tfusion.tokenizers import PixelTokenizer

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def exact(autoencoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a float32 cache of `Tiles`; not to be changed."""
    root = tmp_path_factory.mktemp("exact")
    encode(root, one_by_one(autoencoder), dtype="float32", pictures="all")
    return root


@pytest.fixture
def copied(exact: Path, tmp_path: Path) -> Path:
    """Its shards, to be changed."""
    return Path(shutil.copytree(exact / "latents", tmp_path / "latents"))


def encoded(tokenizer, image: torch.Tensor) -> torch.Tensor:
    """(C, h, w), the oracle: one picture, as `TransfusionModule` encodes it."""
    return tokenizer.encode(image[None].float() / 127.5 - 1)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cache_is_the_corpus_with_latents(autoencoder: str, tmp_path: Path, dtype: str) -> None:
    tokenizer = one_by_one(autoencoder)
    corpus = cache(tmp_path, tokenizer, dtype=dtype, pictures="all")
    assert (corpus.name, corpus.image_size, corpus.latent_shape) == ("tiles", IMAGE_SIZE, LATENT_SHAPE)
    assert (corpus.fingerprint, corpus.codebook_size) == (tokenizer.fingerprint, None)
    assert corpus.attribution == "Tiles of nobody" and not corpus.scenes
    assert corpus.info.factor == 2 and corpus.info.mirrored
    asymmetric = 0
    for split in SPLITS:
        pictures, originals = corpus.load(split), Tiles().load(split)
        assert len(pictures) == len(originals)
        for index, (picture, original) in enumerate(zip(pictures, originals, strict=True)):
            assert (picture.key, picture.captions) == (original.key, original.captions)
            assert pictures.captions(index) == original.captions
            assert torch.equal(picture.image, original.image) and picture.image_size == original.image_size
            rounded = encoded(tokenizer, original.image).to(getattr(torch, dtype)).float()
            assert torch.equal(picture.latents, rounded) and torch.equal(picture.data(), rounded)
            assert picture.latents.dtype == torch.float32
            assert picture.flip == (split == "train")  # nothing else is mirrored
            if picture.flip:
                mirrored = encoded(tokenizer, original.image.flip(-1)).to(getattr(torch, dtype)).float()
                assert torch.equal(picture.data(mirrored=True), mirrored)
                asymmetric += not torch.equal(mirrored, rounded)
    assert asymmetric > 5


def test_ids_are_whole_numbers_of_16_bits(tmp_path: Path) -> None:
    corpus = cache(tmp_path, Halves())
    assert (corpus.codebook_size, corpus.latent_shape) == (300, (1, 4, 4))
    largest = 0.0
    for picture, original in zip(corpus.load("train"), Tiles().load("train"), strict=True):
        assert torch.equal(picture.latents, encoded(Halves(), original.image))
        assert torch.equal(picture.mirrored, encoded(Halves(), original.image.flip(-1)))
        largest = max(largest, picture.latents.max().item())
    assert largest > 255  # a byte would not do
    [shard, *_] = sorted((tmp_path / "latents").iterdir())
    assert len(pq.read_table(shard)["latents"][0].as_py()) == 2 * 16


@pytest.mark.parametrize(("kept", "train"), [("held_out", False), ("none", False), ("all", True)])
def test_pictures_are_kept_where_asked(tmp_path: Path, kept: str, train: bool) -> None:
    corpus = cache(tmp_path, Halves(), pictures=kept)
    for split in SPLITS:
        pictures, here = corpus.load(split), train if split == "train" else kept != "none"
        assert pictures.has_pixels == here
        if here:
            assert torch.equal(pictures[1].image, Tiles().load(split)[1].image)
        else:
            with pytest.raises(ValueError, match=r"its latents alone were kept.*pictures all"):
                pictures[1].image  # noqa: B018


def test_documents_are_those_of_the_corpus(autoencoder: str, exact: Path, byte_tokenizer) -> None:
    """Captions, order, drops and flips of many epochs; latents are those of the pixels the document would have."""
    tokenizer = one_by_one(autoencoder)
    of_pixels, of_latents = (
        CaptionedDocuments(corpus.load("train"), byte_tokenizer, 3, 0.7, 0.2, 0.5)
        for corpus in (Tiles(), Latents(str(exact / "latents")))
    )
    flips = 0
    for epoch in range(3):
        for index in range(11):
            one, other = of_pixels.get(epoch, index), of_latents.get(epoch, index)
            [image], [latents] = one.images, other.images
            assert torch.equal(latents.data, encoded(tokenizer, image.data))
            assert (latents.noise_limit, latents.key) == (image.noise_limit, image.key)
            texts = [[e for e in document.elements if isinstance(e, list)] for document in (one, other)]
            assert texts[0] == texts[1] and len(one.elements) == len(other.elements)
            flips += not torch.equal(image.data, of_pixels.pictures[index].image)
    assert 5 < flips < 28


def test_files_keep_their_keys_and_lose_the_same_captions(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    write_pairs(tmp_path / "pictures")
    files = ImageFiles(str(tmp_path / "pictures"), S, val_share=0.3, flip=True)
    corpus = cache(tmp_path, Halves(), corpora=[files])
    assert corpus.name == "pictures"
    for split in ("train", "val"):
        ours, theirs = corpus.load(split), files.load(split)
        assert [p.key for p in ours] == [p.key for p in theirs]
        most = 20

        def count(captions: list[str]) -> list[int]:
            return [len(caption) + (caption[8] == "4") for caption in captions]  # some are too long

        (kept, bad), (kept_of_pixels, bad_of_pixels) = (p.drop_long_captions(most, count) for p in (ours, theirs))
        assert [(p.key, p.captions) for p in kept] == [(p.key, p.captions) for p in kept_of_pixels]
        assert [record.key for record in bad] == [record.key for record in bad_of_pixels]
        assert kept.has_pixels == (split == "val") and kept.content != "" and len(ours) >= len(kept)
    assert len(corpus.load("test")) == 0
    assert [p.flip for p in corpus.load("train")] == [True] * len(corpus.load("train"))


def test_all_processes_map_one_file(exact: Path) -> None:
    first, second = Latents(str(exact / "latents")), Latents(str(exact / "latents"), name="renamed")
    files = [[entry["filename"] for entry in corpus.tables()[0].dataset.cache_files] for corpus in (first, second)]
    assert files[0] == files[1] and all(os.environ["TFUSION_CACHE"] in file for file in files[0])
    buffer = first.tables()[0].column("latents").chunk(0).buffers()[2]
    assert not buffer.is_mutable
    contents = [corpus.load("train").content for corpus in (first, second)]
    assert contents[0] == contents[1] != first.load("val").content


def test_pictures_without_finite_latents_are_bad_records(tmp_path: Path) -> None:
    broken = [p.key for p in Tiles().load("train") if (p.image[0, 0, [0, -1]] > 200).any()]  # itself, or mirrored
    assert 0 < len(broken) < 11
    corpus = cache(tmp_path, Broken(), data={"max_bad_share": 0.9})
    [table] = corpus.tables()
    held_out = [p.key for split in ("test", "val") for p in Tiles().load(split) if p.image[0, 0, 0] > 200]
    assert [(bad.key, bad.cause) for bad in table.bad] == [
        (key, "latents not finite") for key in sorted(held_out + broken, key=[b.key for b in table.bad].index)
    ]
    assert sorted(bad.key for bad in table.bad) == sorted(held_out + broken)
    kept = [p.key for p in Tiles().load("train") if p.key not in broken]
    assert [p.key for p in corpus.load("train")] == kept


def test_float16_that_overflows_is_not_finite(tmp_path: Path) -> None:
    class Large(Halves):
        codebook_size = None

        def encode(self, images):
            return super().encode(images) * 300  # up to 89,700

    corpus = cache(tmp_path, Large(), dtype="float16", data={"max_bad_share": 1.0})
    [table] = corpus.tables()
    large = [
        p.key
        for split in ("test", "train", "val")
        for p in Tiles().load(split)
        if Halves().encode(p.image[None] / 127.5 - 1).max() > 65504 / 300
    ]
    assert sorted(bad.key for bad in table.bad) == sorted(large) != []


def test_a_process_that_outlived_its_run_is_in_no_ones_way(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is still writing a shard while the next run clears up and writes the same one."""
    [first, *_] = sorted(copied.glob("*.parquet"))
    info, rows, before = read_info(first), pq.read_table(first).to_pylist(), first.read_bytes()
    [shard] = [shard for shard in info.shards() if shard.name == first.name]
    write_table = pq.write_table

    def slowly(*args, **kwargs) -> None:
        write_table(*args, **kwargs)
        monkeypatch.setattr(pq, "write_table", write_table)
        write_shard(copied, shard, info, rows)

    monkeypatch.setattr(pq, "write_table", slowly)
    write_shard(copied, shard, info, rows)
    assert first.read_bytes() == before

    def cleared(*args, **kwargs) -> None:
        write_table(*args, **kwargs)
        clear_unfinished(copied)

    monkeypatch.setattr(pq, "write_table", cleared)
    with pytest.raises(FileNotFoundError):  # of the older process alone
        write_shard(copied, shard, info, rows)
    assert first.read_bytes() == before and not list(copied.glob(".*"))


# What is refused.


def test_missing_shards_are_named(copied: Path) -> None:
    for name in ("train-00001-of-00003.parquet", "test-00000-of-00001.parquet"):
        (copied / name).unlink()
    with pytest.raises(ValueError, match=r"2 of 6 shards are missing.*: test-00000-of-00001.*, train-00001-of-00003"):
        Latents(str(copied)).prepare()


def test_no_cache_or_another_one(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'nowhere' holds no shard of a latent cache .*tfusion predict"):
        Latents("nowhere").prepare()
    shutil.copy(copied / "val-00000-of-00002.parquet", copied / "val-00000-of-00003.parquet")
    with pytest.raises(ValueError, match=r"val-00000-of-00003.parquet in .* is of another cache than test-00000"):
        Latents(str(copied)).prepare()
    (copied / "val-00000-of-00003.parquet").unlink()
    (copied / "test-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet cannot be read .*remove it"):
        Latents(str(copied)).prepare()
    pq.write_table(pa.table({"a": [1]}), copied / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="is parquet, but no part of a latent cache"):
        Latents(str(copied)).prepare()


def test_a_shard_of_other_latents_is_refused_before_any_is_read(copied: Path) -> None:
    path = copied / "val-00001-of-00002.parquet"
    info = dataclasses.replace(read_info(path), fingerprint="another")
    [shard] = [shard for shard in info.shards() if shard.name == path.name]
    write_shard(copied, shard, info, pq.read_table(path).to_pylist())
    with pytest.raises(ValueError, match=r"val-00001-of-00002.parquet is of another cache .*fingerprint is 'another'"):
        Latents(str(copied)).prepare()


def test_a_cache_of_another_version(copied: Path) -> None:
    path = copied / "test-00000-of-00001.parquet"
    table = pq.read_table(path)
    metadata = {KEY: table.schema.metadata[KEY].replace(b'"version": 1', b'"version": 99')}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(ValueError, match="of version 99, this tfusion reads 1: encode the corpus again"):
        Latents(str(copied)).prepare()


def test_a_broken_page_is_bad_records(copied: Path) -> None:
    path = copied / "train-00001-of-00003.parquet"
    data = bytearray(path.read_bytes())
    data[10:60] = bytes(50)
    path.write_bytes(data)
    corpus = Latents(str(copied))
    assert len(corpus.load("train")) == 7
    assert {record.cause for record in corpus.tables()[0].bad} == {"broken parquet"}


def test_latents_and_pixels_in_one_run(exact: Path, tiny_data) -> None:
    corpus = Latents(str(exact / "latents"))
    with pytest.raises(ValueError, match=r"\['tiles'\] are latents, \['others'\] are pixels: encode those, too"):
        others = TinyPictures()
        others.name = "others"
        check_together(tiny_data(image_corpora=[corpus, others]))
    check_not_mixed([corpus, corpus])
    check_not_mixed([TinyPictures()])


def test_another_image_tokenizer(exact: Path, autoencoder: str, tmp_path: Path, tiny_data, tiny_module, attached):
    corpus, own = Latents(str(exact / "latents")), one_by_one(autoencoder)
    assert check_latents([corpus], own) and not check_latents([TinyPictures()], own)
    other = one_by_one(save_autoencoder(tmp_path / "other", seed=1))
    data = tiny_data(image_corpora=[corpus])
    module = tiny_module(image_tokenizer=other, latent_shape=LATENT_SHAPE, patch_size=2)
    with pytest.raises(ValueError, match=f"made by the image tokenizer '{own.fingerprint}'.*is '{other.fingerprint}'"):
        attached(data, module)
    with pytest.raises(ValueError, match=f"'{own.fingerprint}'.*is 'pixels'"):
        attached(data, tiny_module())
    with pytest.raises(ValueError, match="'tiles' holds latents, which a model of image ids cannot read"):
        check_latents([corpus], Halves())
    with pytest.raises(ValueError, match="'tiles' holds image ids, which a model of latents cannot read"):
        check_latents([cache(tmp_path / "ids", Halves())], PixelTokenizer())

    class Quarters(Halves):
        def latent_shape(self, image_size):
            return 1, 2, 2

    with pytest.raises(ValueError, match=r"are \(1, 4, 4\), the model's image_tokenizer makes \(1, 2, 2\) of 8 x 8"):
        check_latents([Latents(str(tmp_path / "ids" / "latents"))], Quarters())


def test_another_latent_shape_than_the_models(exact: Path, autoencoder: str, tiny_data, tiny_module, attached) -> None:
    module = tiny_module(image_tokenizer=one_by_one(autoencoder), latent_shape=(5, 8, 8))
    with pytest.raises(ValueError, match=r"become latents of \(5, 4, 4\), the model's latent_shape is \(5, 8, 8\)"):
        attached(tiny_data(image_corpora=[Latents(str(exact / "latents"))]), module)
