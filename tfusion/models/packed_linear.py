"""Matrices laid out as oneDNN multiplies by them: what generation in fp32 on a CPU runs on.

`nn.Linear` in fp32 is MKL's product, which packs the matrix anew in every call; here it is packed once. Of a model of
width 384, on two cores of an AMD Zen 3, one vector times all matrices then takes 0.6, 8 rows 0.5 and 512 rows 0.85 of
the time (`bench/results/speed_cpu_202611.md`). Only for inference: there is no backward, and weights that learn would
have to be packed at every step.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tfusion.models.base import MultimodalModel

# oneDNN packs for a number of rows; this one's layout is as good for one row as any, and for a thousand.
ROWS = 64


# For compiled blocks: inductor takes oneDNN's own operator with weights that are constants only, so each block would be
# compiled for itself. Of this one it knows the shape, and calls it with any weight.
torch.library.define("tfusion::packed_linear", "(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


torch.library.impl("tfusion::packed_linear", "default", _product)


@torch.library.register_fake("tfusion::packed_linear")
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


class PackedLinear(nn.Linear):
    """A linear layer whose weight is oneDNN's; made by `packed` only."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        if torch.compiler.is_compiling():
            return torch.ops.tfusion.packed_linear(x, self.weight, self.bias, self.out_features)
        return _product(x, self.weight, self.bias, self.out_features)


def can_be_packed(model: MultimodalModel) -> bool:
    """In fp32 on a CPU for which torch has oneDNN."""
    weight = model.embedding.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def packed(model: MultimodalModel) -> MultimodalModel:
    """A copy that shares nothing with the model and cannot be copied or saved itself."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    memo = {}
    for layer in layers:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
        memo[id(layer.weight)] = nn.Parameter(weight, requires_grad=False)
    copied = copy.deepcopy(model, memo)
    for layer in copied.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = PackedLinear
    return copied
