"""What is measured, as torchmetrics Metrics."""

from tfusion.metrics.image import DiffusionLoss
from tfusion.metrics.text import TextLoss, token_bytes

__all__ = ["DiffusionLoss", "TextLoss", "token_bytes"]
