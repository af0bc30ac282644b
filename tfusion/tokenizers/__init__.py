"""Text and images to and from what the model sees: ids and latents."""

from tfusion.tokenizers.image import ImageTokenizer, PixelTokenizer, VAETokenizer, VQTokenizer
from tfusion.tokenizers.text import TextTokenizer

__all__ = ["ImageTokenizer", "PixelTokenizer", "TextTokenizer", "VAETokenizer", "VQTokenizer"]
