"""tfusion: train one transformer on text and images, next-token loss and diffusion loss (Transfusion, 2408.11039)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Imported when first used: `import tfusion` alone costs nothing.
_HOMES = {
    "load": "tfusion.loading",
    "Transfusion": "tfusion.models.transfusion",
    "TransfusionModule": "tfusion.training.transfusion",
    "Chameleon": "tfusion.models.chameleon",
    "ChameleonModule": "tfusion.training.chameleon",
    "MultimodalDataModule": "tfusion.data.datamodule",
    "Generator": "tfusion.generation",
    "Request": "tfusion.requests",
    "GenerationConfig": "tfusion.requests",
    "Generation": "tfusion.requests",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tfusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
