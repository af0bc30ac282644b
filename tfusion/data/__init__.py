"""Corpora, their order, mixture and packing, and the LightningDataModule."""

from tfusion.data.openmoji import OpenMoji
from tfusion.data.shakespeare import Shakespeare
from tfusion.data.shapes import Shapes

__all__ = ["OpenMoji", "Shakespeare", "Shapes"]


def __getattr__(name: str) -> None:
    """What a mistyped corpus in a YAML meets; submodules are found all the same."""
    raise AttributeError(
        f"module 'tfusion.data' has no attribute {name!r}: the built-in corpora are {', '.join(__all__)}; "
        "one of your own is given by its import path"
    )
