"""Static key-value cache of a batch of sequences, each of its own length.

A row holds one document. Positions at or past a row's length are rubbish and never seen: there the keys of noisy
patches stand while an image is denoised, behind the longest row's end, where all rows have room.

Legend: L layers, B rows, S capacity, T new positions.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from tfusion.models.attention import as_bias, visible


class KVCache:
    """Keys and values of the positions so far, and what the mask rule needs to know of them.

    Args:
        num_layers, num_rows, num_kv_heads, head_dim: sizes of the model and the batch.
        capacity: positions a row can hold, those among them that a row which writes fewer than others fills with
            rubbish past its end.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_layers, num_rows, num_kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # zeros: 0 x masked rubbish must not be NaN
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.image_ids = torch.full((num_rows, capacity), -1, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.row_lengths = [0] * num_rows  # the same, known without asking the device

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def longest(self) -> int:
        return max(self.row_lengths)

    def select(self, rows: list[int]) -> KVCache:
        """A copy of some rows."""
        new = copy.copy(self)
        index = torch.tensor(rows, device=self.lengths.device)
        new.keys, new.values = self.keys[:, index], self.values[:, index]
        new.image_ids, new.lengths = self.image_ids[index], self.lengths[index]
        new.row_lengths = [self.row_lengths[row] for row in rows]
        return new

    def first(self, rows: int) -> KVCache:
        """So many rows in place: what either writes, the other reads."""
        new = copy.copy(self)
        new.keys, new.values = self.keys[:, :rows], self.values[:, :rows]
        new.image_ids, new.lengths = self.image_ids[:rows], self.lengths[:rows]
        new.row_lengths = self.row_lengths[:rows]
        return new

    def put(self, rows: list[int], source: KVCache, source_rows: list[int]) -> None:
        """Overwrite some rows with rows of another cache of the same capacity."""
        to = torch.tensor(rows, device=self.lengths.device, dtype=torch.long)
        of = torch.tensor(source_rows, device=self.lengths.device, dtype=torch.long)
        self.keys[:, to], self.values[:, to] = source.keys[:, of], source.values[:, of]
        self.image_ids[to], self.lengths[to] = source.image_ids[of], source.lengths[of]
        for row, source_row in zip(rows, source_rows, strict=True):
            self.row_lengths[row] = source.row_lengths[source_row]

    def view(self, image_ids: Tensor, write: bool, columns: int | None = None) -> CacheView:
        """What one forward of T new positions a row needs, (B, T) image ids (-1 off images).

        Args:
            image_ids: (B, T).
            write: the new positions are the rows' own, see `CacheView`.
            columns: with `write`: read so many, and ask only the device how long rows are, so that the forward can be
                recorded and replayed; None = those that are needed.
        """
        return CacheView(self, image_ids, write, columns)

    def advance(self, num_new: list[int]) -> None:
        """Count `num_new[b]` of the positions just written as row b's own; the rest was rubbish."""
        self.lengths += torch.tensor(num_new).to(self.lengths.device, non_blocking=True)
        self.row_lengths = [a + b for a, b in zip(self.row_lengths, num_new, strict=True)]


class CacheView:
    """One forward's access to the cache: where the new positions stand and what they see.

    With `write` the new keys are the rows' own (the caller then advances the cache); without it they stand behind the
    longest row, and belong to none. `mask` is for all layers; None where everything is seen.
    """

    def __init__(self, cache: KVCache, image_ids: Tensor, write: bool, columns: int | None = None) -> None:
        self.cache, self.write = cache, write
        B, T = image_ids.shape
        if columns is not None and not write:
            raise ValueError("got columns without write: what belongs to no row stands where the host says")
        lengths = set(cache.row_lengths) if columns is None else ()
        self.start = cache.row_lengths[0] if len(lengths) == 1 else None  # where all rows go on, if that is one place
        self.index = cache.lengths[:, None] + torch.arange(T, device=image_ids.device)  # (B, T) index in its row
        self.longest = cache.longest  # once: within compiled blocks it would be compiled for each number of rows
        self.seen = columns or self.longest + T  # columns of the cache that are read
        needed = max(self.seen, self.longest + T)
        if needed > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} positions a row, {needed} are needed")
        if write:
            self.store(cache.image_ids, image_ids)
        one_token = write and T == 1 and self.start is not None  # a row's last position sees the whole row
        self.mask = None if one_token else self._mask(image_ids)

    def _mask(self, image_ids: Tensor) -> Tensor:
        """(B, 1, T, S), as `training_mask`'s."""
        cache, new = self.cache, self.index
        B, T = new.shape
        if self.write:
            columns = torch.arange(self.seen, device=new.device).expand(B, -1)
            key_index, key_image = columns, cache.image_ids[:, : self.seen]
            in_row = columns < (cache.lengths + T)[:, None]
        else:
            columns = torch.arange(self.longest, device=new.device).expand(B, -1)
            key_index = torch.cat([columns, new], 1)
            key_image = torch.cat([cache.image_ids[:, : self.longest], image_ids], 1)
            in_row = torch.cat([columns < cache.lengths[:, None], torch.ones_like(new, dtype=torch.bool)], 1)
        document = torch.where(in_row, 0, -1)[:, None, :]  # a row is one document; the rest belongs to none
        seen = visible(
            new[:, :, None],
            key_index[:, None, :],
            torch.zeros_like(document),
            document,
            image_ids[:, :, None],
            key_image[:, None, :],
            torch.zeros_like(document, dtype=torch.bool),
        )
        return as_bias(seen, cache.keys.dtype)[:, None]

    def store(self, columns: Tensor, new: Tensor) -> None:
        """Put (B, T) or (B, H, T, K) behind what each row has."""
        dim = 1 if columns.ndim == 2 else 2
        if self.start is not None:
            columns.narrow(dim, self.start, new.shape[dim]).copy_(new)  # one place: one copy
            return
        rows, new = torch.arange(len(new), device=new.device)[:, None], new.to(columns.dtype)
        if dim == 1:
            columns[rows, self.index] = new
        else:  # (scatter_ would copy all columns and back)
            columns[rows, :, self.index] = new.transpose(1, 2)

    def layer(self, number: int) -> LayerCache:
        """The part of one layer."""
        return LayerCache(self, self.cache.keys[number], self.cache.values[number])


class LayerCache(NamedTuple):
    """One layer's keys and values of all rows, (B, H, S, K), in one forward; without a number, so that one compiled
    block serves all layers.
    """

    view: CacheView
    keys: Tensor
    values: Tensor

    def __call__(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values that the new positions may see; (B, H, T, K) -> (B, H, S, K)."""
        view = self.view
        if view.write:
            view.store(self.keys, key)
            view.store(self.values, value)
        else:
            self.keys[:, :, view.longest : view.seen] = key
            self.values[:, :, view.longest : view.seen] = value
        return self.keys[:, :, : view.seen], self.values[:, :, : view.seen]
