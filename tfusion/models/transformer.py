"""The trunk, Llama's flavour (Transfusion §4.1, footnote 4): pre-norm RMSNorm, SwiGLU, rotary positions, no biases.

It knows neither text nor images: vectors in, vectors out. Options beyond the paper: grouped keys, and what Chameleon
is held stable by, QK-norm and norms behind attention and feed-forward instead of before (arXiv 2405.09818, §2.3).

Legend: B rows, T positions, D width, H heads, K head dim, F hidden width of the feed-forward.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tfusion.models.attention import Mask, attend
from tfusion.models.kv_cache import CacheView, LayerCache

NormOrder = Literal["pre", "post"]
Checkpointing = Literal["none", "selective", "full"] | bool  # false and true: none and full
# What a backward pass spends its time on if it has to be computed again; the rest of a block reads and writes memory.
# Not `baddbmm`, the scores of attention written out: (T, T) a head, they are what checkpointing is to be rid of. Flex
# attention is seen, and kept, in compiled blocks only.
SAVED_WHERE_SELECTIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
]
keep_selected = partial(create_selective_checkpoint_contexts, SAVED_WHERE_SELECTIVE)
# Nothing is drawn, so no generator's state needs to be kept
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def default_hidden_dim(dim: int) -> int:
    """Llama's 8/3 D, rounded up to a multiple of 256 (64 below D = 1024)."""
    multiple = 256 if dim >= 1024 else 64
    return -(-8 * dim // 3 // multiple) * multiple


class RMSNorm(nn.RMSNorm):
    """torch's, in the type of its weights: under autocast inputs may be in bf16, for which it has no fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Rotary(nn.Module):
    """Rotary position tables (RoFormer eq. 34), halves rotated as in Llama; fp32, filled by `fill_buffers`."""

    def __init__(self, head_dim: int, max_seq_len: int, theta: float) -> None:
        super().__init__()
        self.theta = theta
        self.register_buffer("cos", torch.empty(max_seq_len, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, head_dim // 2), persistent=False)

    def fill_buffers(self) -> None:
        length, half = self.cos.shape
        frequencies = self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # (T, K/2)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) -> cos, twice beside itself, and -sin beside sin, each (B, 1, T, K), as `rotate` takes them."""
        cos, sin = self.cos[position_ids][:, None], self.sin[position_ids][:, None]
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (B, H, T, K) by position, in fp32 at least: (a cos - b sin, b cos + a sin) of the halves a, b."""
    cos, sin = rotary  # three kernels on whole vectors: decoding and training feel each one
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with H query heads over H_kv key heads."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, qk_norm: bool, norm_eps: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.qkv_proj = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: LayerCache | None) -> Tensor:
        B, T, D = x.shape
        heads = self.qkv_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 H_kv, T, K)
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], 1)
        if self.qk_norm:
            q, k = qk.split([self.num_heads, self.num_kv_heads], 1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 1)
        q, k = rotate(qk, rotary).split([self.num_heads, self.num_kv_heads], 1)  # together: half the kernels
        if cache is not None:
            k, v = cache(k, v)
        q, k, v = (each.to(heads.dtype) for each in (q, k, v))  # norms leave autocast in fp32
        out = attend(q, k, v, mask)  # (B, H, T, K)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)  # (B, T, F) each
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each added to the stream; what they read is normed (`pre`), or what they add."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        hidden_dim: int,
        qk_norm: bool,
        norm_eps: float,
        norm_order: NormOrder = "pre",
    ) -> None:
        super().__init__()
        self.norm_order = norm_order
        self.attention_norm = RMSNorm(dim, eps=norm_eps)
        self.attention = Attention(dim, num_heads, num_kv_heads, qk_norm, norm_eps)
        self.feed_forward_norm = RMSNorm(dim, eps=norm_eps)
        self.feed_forward = FeedForward(dim, hidden_dim)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        cache: LayerCache | None = None,
        selective: bool = False,
    ) -> Tensor:
        if selective:  # in here: outside of a compiled block nothing in it could be selected
            return recomputed(self._compute, x, rotary, mask, None, context_fn=keep_selected)
        return self._compute(x, rotary, mask, cache)

    def _compute(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: LayerCache | None) -> Tensor:
        if self.norm_order == "post":  # Swin Transformer V2, as Chameleon §2.3
            x = x + self.attention_norm(self.attention(x, rotary, mask, cache))
            return x + self.feed_forward_norm(self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """L blocks and a final norm, (B, T, D) -> (B, T, D).

    Args: as `Transfusion`'s of the same name, and `norm_order` as `Chameleon`'s.

    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        max_seq_len: int = 4096,
        qk_norm: bool = False,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        activation_checkpointing: Checkpointing = "none",
        norm_order: NormOrder = "pre",
    ) -> None:
        super().__init__()
        if norm_order not in ("pre", "post"):
            raise ValueError(f"got norm_order {norm_order!r}, expected 'pre' or 'post'")
        if isinstance(activation_checkpointing, bool):
            activation_checkpointing = "full" if activation_checkpointing else "none"
        if activation_checkpointing not in ("none", "selective", "full"):
            raise ValueError(
                f"got activation_checkpointing {activation_checkpointing!r}, expected 'none', 'selective' or 'full'"
            )
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        hidden_dim = default_hidden_dim(dim) if hidden_dim is None else hidden_dim
        if min(dim, num_layers, num_heads, num_kv_heads, hidden_dim, max_seq_len) < 1:
            raise ValueError(
                f"model sizes dim {dim}, num_layers {num_layers}, num_heads {num_heads}, num_kv_heads {num_kv_heads}, "
                f"hidden_dim {hidden_dim}, max_seq_len {max_seq_len}: each must be at least 1"
            )
        if dim % (2 * num_heads):
            raise ValueError(f"dim {dim} must be a multiple of 2 x num_heads = {2 * num_heads} (rotary pairs)")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.max_seq_len = dim // num_heads, max_seq_len
        self.activation_checkpointing = activation_checkpointing
        self.rotary = Rotary(self.head_dim, max_seq_len, rope_theta)
        sizes = (dim, num_heads, num_kv_heads, hidden_dim, qk_norm, norm_eps, norm_order)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(num_layers))
        self.norm = RMSNorm(dim, eps=norm_eps)

    def compile_blocks(self, dynamic: bool = False) -> None:
        """Compile each block in place: names of weights stay, and all blocks share one compiled code.

        Args:
            dynamic: for rows of every length, as generation has them; else once for each length.
        """
        for block in self.blocks:
            block.compile(dynamic=dynamic)

    def forward(
        self, x: Tensor, position_ids: Tensor, mask: Mask | None = None, cache: CacheView | None = None
    ) -> Tensor:
        """(B, T, D) at (B, T) positions, under a mask, or under the mask of a cache."""
        mask = cache.mask if cache is not None else mask
        rotary = self.rotary(position_ids)
        learns = cache is None and self.training and torch.is_grad_enabled()
        checkpointing = self.activation_checkpointing if learns else "none"
        for number, block in enumerate(self.blocks):
            if checkpointing == "full":  # out here: FSDP2's hooks, at which a compiled block breaks, may lie in it
                x = recomputed(block, x, rotary, mask)
            else:
                x = block(x, rotary, mask, cache and cache.layer(number), checkpointing == "selective")
        return self.norm(x)
