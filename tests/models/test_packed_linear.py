"""Packed matrices: the same products and the same model, apart from what learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tfusion.models.chameleon import Chameleon
from tfusion.models.packed_linear import PackedLinear, can_be_packed, packed
from tfusion.models.transfusion import Transfusion
from tfusion.requests import parse_request

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def small(**variant) -> Transfusion:
    model = Transfusion(261, (3, 8, 8), 4, 32, 2, 4, max_seq_len=96, **variant).materialize("cpu", 0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel())).mul_(0.2)
    return model


@pytest.mark.parametrize("sizes", [(384, 1152), (384, 261), (1024, 384), (3, 7), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_every_number_of_rows_has_the_products_of_a_linear_layer(sizes: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*sizes, bias=bias)
    [own] = packed(nn.Sequential(layer))
    assert type(own) is PackedLinear
    for shape in [(1, 1), (8, 1), (2, 300), (0, 4), (1030,), ()]:
        x = torch.randn(*shape, sizes[0])
        expected = x.double() @ layer.weight.double().t() + (layer.bias.double() if bias else 0)
        torch.testing.assert_close(own(x).double(), expected, rtol=1e-5, atol=1e-4)
    strided = torch.randn(5, 9, 2 * sizes[0])[:, ::2, : sizes[0]]
    torch.testing.assert_close(own(strided), layer(strided), rtol=1e-5, atol=1e-4)


def test_a_packed_model_is_the_same_and_a_copy() -> None:
    model = small()
    copied = packed(model)
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    assert sum(type(m) is PackedLinear for m in copied.modules()) == len(layers) > 10
    assert not any(type(m) is nn.Linear for m in copied.modules())
    hidden = torch.randn(2, 5, 32)
    mask = torch.ones(5, 5).tril().bool()[None, None]
    places = torch.arange(5).expand(2, -1)

    def seen(of: Transfusion) -> torch.Tensor:
        return of.text_head(of.transformer(of.embedding(torch.arange(10).view(2, 5)) + hidden, places, mask))

    with torch.no_grad():
        before = seen(copied)
        torch.testing.assert_close(before, seen(model), rtol=1e-4, atol=1e-5)
        for parameter in model.parameters():
            parameter.zero_()  # as if it had learned
        assert torch.equal(seen(copied), before)


@torch.no_grad()
def test_hooks_stay() -> None:
    model, calls = small(), []
    model.text_head.register_forward_pre_hook(lambda *_: calls.append(1))
    packed(model).text_head(torch.zeros(1, 32))
    assert calls == [1]


def test_only_fp32_is_packed() -> None:
    assert can_be_packed(small())
    assert not can_be_packed(small().double())
    assert not can_be_packed(small().to(torch.bfloat16))
    assert not can_be_packed(Transfusion(261, (3, 8, 8), 4, 32, 2, 4, max_seq_len=96))  # on no device yet


def test_modules_generate_from_it(tiny_module, byte_tokenizer) -> None:
    module = tiny_module()
    module.materialize("cpu")
    module.text_tokenizer = byte_tokenizer
    requests = [{"segments": ["red"], "generate": kind, "num_inference_steps": 3} for kind in ("image", "text")]
    module.hold_generation_model()
    assert isinstance(module._held[0].text_head, PackedLinear)
    held = module.generate(requests)
    parsed = [parse_request(request, module.generation) for request in requests]
    plain = module._generator(module.evaluation_model).generate(parsed)
    assert held[1].segments == plain[1].segments
    a, b = (torch.tensor(list(made[0].segments[0].tobytes())) for made in (held, plain))
    assert (a - b).abs().max() <= 1  # of 255: rounded from sums in another order


def test_chameleon_too() -> None:
    model = Chameleon(261, 16, (1, 4, 4), 32, 2, 4, max_seq_len=64).materialize("cpu", 0)
    assert isinstance(packed(model).head, PackedLinear)
