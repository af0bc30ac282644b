"""How many parameters has which size with which adapter? Prints one JSON object a row; nothing is allocated.

    python -m tfusion.bench.parameters

The sizes are the paper's Table 2 with its vocabulary (32,000 and our 5 special ids) and latents (8 x 32 x 32); adapters
are `linear` and `conv` at k = 2 latents a patch side, and `unet` at 1, 2, 4 and 8.

- `trunk`, `embedding`, `text_head`, `patch_encoder`, `patch_decoder`: parameters of each part.
- `adapter`: of both patch adapters; `percent`: that in % of all else, as the paper's Table 7 gives it.
- `paper_percent`: Table 7's share; `paper`: the parameters that it means of the size's name (so 0.27B all but for
  0.16B); null where the paper says nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

from tfusion.models.transfusion import Transfusion

LATENT_SHAPE, VOCAB_SIZE = (8, 32, 32), 32_005
SIZES = {  # the paper's Table 2: layers, D, heads
    "0.16b": (16, 768, 12),
    "0.37b": (24, 1024, 16),
    "0.76b": (24, 1536, 24),
    "1.4b": (24, 2048, 16),
    "7b": (32, 4096, 32),
}
ADAPTERS = [("linear", 2), ("unet", 1), ("unet", 2), ("unet", 4), ("unet", 8), ("conv", 2)]
PAPER_PERCENT = {  # its Table 7, both at k = 2
    "linear": {"0.16b": 0.5, "0.37b": 0.4, "0.76b": 0.4, "1.4b": 0.4, "7b": 0.3},
    "unet": {"0.16b": 106.1, "0.37b": 71.3, "0.76b": 35.5, "1.4b": 19.3, "7b": 3.8},
}


def row(size: str, adapter: str, patch_size: int) -> dict[str, Any]:
    """One size with one adapter."""
    layers, dim, heads = SIZES[size]
    model = Transfusion(VOCAB_SIZE, LATENT_SHAPE, patch_size, dim, layers, heads, adapter=adapter)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[name.split(".")[0]] += parameter.numel()
    parts["trunk"] = parts.pop("transformer")
    ours = parts["patch_encoder"] + parts["patch_decoder"]
    percent = PAPER_PERCENT.get(adapter, {}).get(size) if patch_size == 2 else None
    return {
        "size": size,
        "adapter_name": adapter,
        "patch_size": patch_size,
        "patches": model.num_patches,
        **{name: parts[name] for name in ("trunk", "embedding", "text_head", "patch_encoder", "patch_decoder")},
        "total": sum(parts.values()),
        "adapter": ours,
        "percent": round(100 * ours / (sum(parts.values()) - ours), 2),
        "paper": None if percent is None else round(percent * 1e7 * float(size.removesuffix("b"))),
        "paper_percent": percent,
    }


def main(args: list[str] | None = None) -> None:
    """All sizes with all adapters."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(args)
    for size in SIZES:
        for adapter, patch_size in ADAPTERS:
            sys.stdout.write(json.dumps(row(size, adapter, patch_size)) + "\n")


if __name__ == "__main__":
    main()
