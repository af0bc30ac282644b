"""What settings alone show is refused before a corpus is read, in words of the module that cannot use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import BYTES_VOCAB_SIZE, IMAGE_SIZE
from tests.data.latent_caches import LATENT_SHAPE, Halves, cache, one_by_one, save_autoencoder
from tests.test_cli import CONFIG, tfusion
from tfusion.data import Latents
from tfusion.data.corpora import CaptionedImage, Split
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.models.reference_encoder import ReferenceEncoder
from tfusion.training.encoding import CorpusEncoder
from tfusion.training.reference_encoder import ReferenceEncoderModule


class Unread:
    """A corpus, of pictures or of text, that may not be read."""

    name, image_size = "unread", IMAGE_SIZE

    def prepare(self) -> None:
        raise AssertionError("prepared")

    def load(self, split: str) -> Any:
        raise AssertionError("read")


class UnreadText(Unread):
    name = "unread text"


class Odd(Unread):
    """Of a size that no autoencoder of factor 2 divides."""

    image_size = 7


class NinePixels(Unread):
    """For YAML, with the types that jsonargparse looks for."""

    name, image_size = "nine", 9

    def load(self, split: Split) -> Sequence[CaptionedImage]:
        raise AssertionError("read")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def latents(autoencoder: str, tmp_path_factory: pytest.TempPathFactory) -> Latents:
    return cache(tmp_path_factory.mktemp("latents"), one_by_one(autoencoder), dtype="float32")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Latents:
    return cache(tmp_path_factory.mktemp("ids"), Halves())


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of latents may be read, either."""
    for name in ("prepare", "load"):
        monkeypatch.setattr(Latents, name, getattr(Unread, name))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_nothing_is_read_before_a_refusal(
    stage: str, tiny_module, tiny_data, tiny_trainer, autoencoder, latents, ids, tmp_path, unread
) -> None:
    own = {"image_tokenizer": one_by_one(autoencoder), "latent_shape": LATENT_SHAPE, "patch_size": 2}
    other = own | {"image_tokenizer": one_by_one(save_autoencoder(tmp_path / "other", seed=1))}
    for model, corpus, message in (
        (own, Odd(), "got image_size 7, expected a multiple of 2"),
        (own | {"latent_shape": (5, 8, 8)}, Unread(), r"latents of \(5, 4, 4\), the model's latent_shape is \(5, 8, 8"),
        (
            other,
            latents,
            rf"by the image tokenizer '\w+' \(of '{autoencoder}'\), the model's is '\w+' \(of '.*/other'\)",
        ),
        (own, ids, "'tiles' holds image ids, which a model of latents cannot read"),
    ):
        data = tiny_data(image_corpora=[corpus], text_corpora=[UnreadText()])
        with pytest.raises(ValueError, match=message):
            getattr(tiny_trainer(1), stage)(tiny_module(**model), data)
    with pytest.raises(AssertionError, match="prepared"):
        getattr(tiny_trainer(1), stage)(tiny_module(**own), tiny_data(image_corpora=[Unread()]))


def test_a_corpus_to_encode_is_not_read_either(autoencoder: str, tiny_trainer) -> None:
    module = CorpusEncoder(one_by_one(autoencoder))
    with pytest.raises(ValueError, match="got image_size 7, expected a multiple of 2"):
        tiny_trainer(1).predict(module, MultimodalDataModule([Odd()]))
    with pytest.raises(ValueError, match=r"got the corpora \['unread', 'unread text'\]"):
        tiny_trainer(1).predict(module, MultimodalDataModule([Unread()], [UnreadText()]))


def test_the_command_refuses_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    corpora = f"--data.image_corpora=[{{class_path: {__name__}.NinePixels}}]"
    code, output = tfusion(tmp_path, "fit", "--config", "config.yaml", corpora)
    assert code == 2 and "pictures of 9 x 9 become latents of (3, 9, 9)" in output


def test_chameleon_says_what_it_cannot_use(tiny_chameleon, tiny_data, tiny_trainer, latents, ids, unread) -> None:
    for model, data, message in (
        ({"image_tokenizer": None}, {"image_corpora": [Unread()]}, "image corpus 'unread' and no image_tokenizer"),
        ({"image_tokenizer": None}, {"image_corpora": [ids]}, "image corpus 'tiles' and no image_tokenizer"),
        ({}, {"image_corpora": [ids]}, "the corpus 'tiles' has 300 ids, the model's codebook_size is 27"),
        ({}, {"image_corpora": [latents]}, "the corpus 'tiles' gives no ids"),
        ({}, {"image_first_noise_limit": 0.5}, "image_first_noise_limit 0.5, but Chameleon's images are ids"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_trainer(1).fit(tiny_chameleon(**model), tiny_data(**{"text_corpora": [UnreadText()]} | data))


def test_the_reference_encoder_sees_pictures_not_latents(latents, tiny_trainer, unread) -> None:
    module = ReferenceEncoderModule(ReferenceEncoder(BYTES_VOCAB_SIZE, 16, 16, 20, 2, 2))
    data = MultimodalDataModule([latents], seq_len=64, caption_first=1.0, caption_drop=0.0)
    with pytest.raises(ValueError, match="corpus 'tiles' holds latents; the reference encoder sees pictures"):
        tiny_trainer(1).fit(module, data)


def test_a_noise_limit_is_no_fault_where_there_are_no_pictures(tiny_chameleon, tiny_data, tiny_trainer) -> None:
    data = tiny_data(image_corpora=[], image_first_noise_limit=0.5)
    tiny_trainer(1).fit(tiny_chameleon(image_tokenizer=None), data)
