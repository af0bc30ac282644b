"""Corpora, their order, mixture and packing, and the LightningDataModule."""

from tfusion.data.openmoji import OpenMoji
from tfusion.data.shakespeare import Shakespeare
from tfusion.data.shapes import Shapes

__all__ = ["OpenMoji", "Shakespeare", "Shapes"]
