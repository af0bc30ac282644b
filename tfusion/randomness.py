"""Every random number of the package is a function of what it is for: `generator("noise", seed, step, row)`.

Nothing reads or writes a global generator, so ranks, workers, micro-batches and resumes cannot change a draw.
"""

from __future__ import annotations

import hashlib

import torch


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed from any integers and strings; equal parts give equal seeds on every machine and version."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `seed_from(*parts)`."""
    return torch.Generator().manual_seed(seed_from(*parts))


def uniform(*parts: int | str) -> float:
    """One number in [0, 1) from `seed_from(*parts)`."""
    return seed_from(*parts) / 2**63
