"""Corpora, their order, mixture and packing, and the LightningDataModule."""

from tfusion.data.image_files import ImageFiles
from tfusion.data.latents import Latents
from tfusion.data.openmoji import OpenMoji
from tfusion.data.shakespeare import Shakespeare
from tfusion.data.shapes import Shapes
from tfusion.data.text_files import TextFiles

__all__ = ["ImageFiles", "Latents", "OpenMoji", "Shakespeare", "Shapes", "TextFiles"]


def __getattr__(name: str) -> None:
    """What a mistyped corpus in a YAML meets; submodules are found all the same."""
    raise AttributeError(
        f"module 'tfusion.data' has no attribute {name!r}: the corpora are {', '.join(__all__)}; "
        "a class of your own is given by its import path"
    )
