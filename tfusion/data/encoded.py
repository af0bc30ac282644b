"""Do corpora of latents fit each other and the model's image tokenizer? Told from what the shards say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tfusion.data.corpora import ImageCorpus
from tfusion.data.latents import Latents
from tfusion.tokenizers.image import in_words


def check_not_mixed(corpora: Sequence[ImageCorpus]) -> None:
    """Raise ValueError unless all of them are latents, or none is: rows hold the one or the other."""
    encoded = [corpus.name for corpus in corpora if isinstance(corpus, Latents)]
    others = [corpus.name for corpus in corpora if not isinstance(corpus, Latents)]
    if encoded and others:
        raise ValueError(
            f"the image corpora {encoded} are latents, {others} are pixels: encode those, too (tfusion predict "
            "--config configs/encode.yaml), or take all of them as pictures"
        )


def check_latents(corpora: Sequence[ImageCorpus], image_tokenizer: Any) -> bool:
    """Whether the corpora are latents; raises ValueError where another image tokenizer made them than the model's."""
    encoded = [corpus for corpus in corpora if isinstance(corpus, Latents)]
    ids = getattr(image_tokenizer, "codebook_size", None)
    for corpus in encoded:
        if (corpus.codebook_size is None) != (ids is None):
            kinds = ["latents, which a model of image ids", "image ids, which a model of latents"]
            raise ValueError(
                f"corpus {corpus.name!r} holds {kinds[corpus.codebook_size is not None]} cannot read: encode it with "
                "the model's image_tokenizer (tfusion predict --config configs/encode.yaml)"
            )
        if corpus.fingerprint != image_tokenizer.fingerprint:
            raise ValueError(
                f"the latents of corpus {corpus.name!r} were made by the image tokenizer "
                f"{in_words(corpus.fingerprint, corpus.info.made_by)}, the model's is {image_tokenizer}: give the "
                "model the autoencoder that made them, or encode the corpus again with the model's into another "
                "folder (tfusion predict --config configs/encode.yaml "
                "--model.init_args.image_tokenizer.init_args.path THE_MODELS --trainer.default_root_dir runs/another)"
            )
        expected = tuple(image_tokenizer.latent_shape(corpus.image_size))
        if corpus.latent_shape != expected:
            raise ValueError(
                f"the latents of corpus {corpus.name!r} are {corpus.latent_shape}, the model's image_tokenizer makes "
                f"{expected} of {corpus.image_size} x {corpus.image_size} pixels: encode the corpus again"
            )
    return bool(encoded)
