"""What is measured, as torchmetrics Metrics, and the networks that some of it is measured with."""

from tfusion.metrics.choices import ChoiceAccuracy
from tfusion.metrics.clip_score import Clip, ClipScore
from tfusion.metrics.distances import ImageDistances
from tfusion.metrics.frechet import FrechetDistance
from tfusion.metrics.image import DiffusionLoss
from tfusion.metrics.inception import Inception
from tfusion.metrics.networks import FeatureNetwork, ImageFeatures, PairScore
from tfusion.metrics.reconstruction import Reconstruction
from tfusion.metrics.reference import Reference
from tfusion.metrics.text import TextLoss, standard_error_of_mean, token_bytes

__all__ = [
    "ChoiceAccuracy",
    "Clip",
    "ClipScore",
    "DiffusionLoss",
    "FeatureNetwork",
    "FrechetDistance",
    "ImageDistances",
    "ImageFeatures",
    "Inception",
    "PairScore",
    "Reconstruction",
    "Reference",
    "TextLoss",
    "standard_error_of_mean",
    "token_bytes",
]
