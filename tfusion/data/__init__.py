"""Corpora, their order, mixture and packing, and the LightningDataModule."""

from tfusion.data.openmoji import OpenMoji
from tfusion.data.shakespeare import Shakespeare

__all__ = ["OpenMoji", "Shakespeare"]
