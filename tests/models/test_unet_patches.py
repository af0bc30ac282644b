"""The U-Net's blocks are those of diffusers and of loops; what it sees, skips and knows of the time; its sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from torch import Tensor

from tests.models.test_patches import normal
from tests.reference.attention import loop_attention
from tfusion.models.patches import TimestepEmbedding, num_patches
from tfusion.models.transfusion import Transfusion
from tfusion.models.unet_patches import (
    ResidualBlock,
    SelfAttention,
    UNetPatchDecoder,
    UNetPatchEncoder,
    group_norm,
    widths_of,
)

SIDES = [1, 2, 4, 8]


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, away from zeros and ones."""
    module = module.double()
    for i, parameter in enumerate(module.parameters()):
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data = normal(*parameter.shape, seed=10 + i) * fan_in**-0.5
    for part in module.modules():
        if isinstance(part, TimestepEmbedding):
            part.fill_buffers()
    return module


def adapters(k: int, channels: int = 32, **settings) -> tuple[UNetPatchEncoder, UNetPatchDecoder]:
    shape = (3, 16, 8)
    encoder = randomised(UNetPatchEncoder(shape, k, 24, channels, **settings))
    return encoder, randomised(UNetPatchDecoder(shape, k, 24, channels))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (32, 16), (8, 64)])
def test_a_residual_block_is_diffusers(inputs: int, outputs: int) -> None:
    ours = randomised(ResidualBlock(inputs, outputs, 12))
    groups = {"groups": ours.norm_1.num_groups, "groups_out": ours.norm_2.num_groups}
    theirs = ResnetBlock2D(in_channels=inputs, out_channels=outputs, temb_channels=12, eps=1e-5, **groups).double()
    names = {"norm_1": "norm1", "conv_1": "conv1", "time_proj": "time_emb_proj", "norm_2": "norm2", "conv_2": "conv2"}
    names["shortcut"] = "conv_shortcut"
    weights = {}
    for name, weight in ours.state_dict().items():
        module, kind = name.rsplit(".", 1)
        weights[f"{names[module]}.{kind}"] = weight
    theirs.load_state_dict(weights)
    x, time = normal(3, inputs, 4, 6), normal(3, 12, seed=1)
    close(ours(x, time), theirs(x, time))


def test_halving_and_doubling_are_diffusers() -> None:
    encoder, decoder = adapters(2)
    x = normal(2, 16, 8, 4)
    down = Downsample2D(16, use_conv=True, out_channels=32).double()
    down.conv.load_state_dict(encoder.downs[0].state_dict())
    close(encoder.downs[0](x), down(x))
    up = Upsample2D(32, use_conv=True, out_channels=16).double()
    up.conv.load_state_dict(decoder.ups[0].state_dict())
    x = normal(2, 32, 4, 2)
    close(decoder.ups[0](F.interpolate(x, scale_factor=2.0, mode="nearest")), up(x))


def test_attention_is_that_of_a_loop_and_sees_everything() -> None:
    module = randomised(SelfAttention(96))  # 3 heads of 32
    x = normal(2, 96, 2, 3)
    vectors = F.group_norm(x, module.norm.num_groups, module.norm.weight, module.norm.bias).flatten(2).transpose(1, 2)
    qkv = vectors @ module.qkv_proj.weight.T + module.qkv_proj.bias  # (I, P, 3 c)
    query, key, value = (part.unflatten(2, (3, 32)).transpose(1, 2) for part in qkv.split(96, 2))
    out = loop_attention(query, key, value, torch.ones(2, 6, 6, dtype=torch.bool)).transpose(1, 2).flatten(2)
    out = out @ module.o_proj.weight.T + module.o_proj.bias
    close(module(x), x + out.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("k", SIDES)
def test_the_way_down_and_up_stage_by_stage(k: int) -> None:
    """Written out: each resolution twice, attention at the lowest alone, and skips last in, first out."""
    encoder, decoder = adapters(k, positions=True)
    x_t, timesteps = normal(2, 3, 16, 8), torch.tensor([0.0, 700.0]).double()
    time = encoder.timestep(timesteps)
    x, skips = encoder.in_conv(x_t), []
    for level, (first, second) in enumerate(encoder.stages):
        if level > 0:
            x = encoder.downs[level - 1](x)
        for stage in (first, second):
            x = stage.residual(x, time)
            if x.shape[2:] == (16 // k, 8 // k):
                x = stage.attention(x)
            skips.append(x)
    vectors = encoder.proj(F.silu(encoder.norm(x)).flatten(2).transpose(1, 2)) + encoder.positions.weight
    ours, skip = encoder(x_t, timesteps)
    assert ours.shape == (2, num_patches((3, 16, 8), k), 24)
    close(ours, vectors)
    assert len(skip) == len(skips) == 2 * k.bit_length()

    hidden, time = normal(2, ours.shape[1], 24, seed=3), decoder.timestep(timesteps)
    x = torch.stack([decoder.in_proj(image).T.reshape(32, 16 // k, 8 // k) for image in hidden])
    for level, stages in enumerate(decoder.stages):
        if level > 0:
            x = decoder.ups[level - 1](x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        for stage in stages:
            x = stage.residual(torch.cat([x, skips.pop()], 1), time)
            if level == 0:
                x = stage.attention(x)
    close(decoder(hidden, skip, timesteps), decoder.proj(F.silu(decoder.norm(x))))
    assert not skips


@pytest.mark.parametrize("k", SIDES)
def test_everything_that_goes_in_comes_out(k: int) -> None:
    """Every latent reaches every patch; the decoder looks at the trunk, at each skip and at the time."""
    encoder, decoder = adapters(k)
    x_t, timesteps = normal(1, 3, 16, 8), torch.tensor([300.0]).double()
    vectors, skip = encoder(x_t, timesteps)
    for row, column in ((0, 0), (7, 3), (15, 7)):
        new = x_t.clone()
        new[0, 1, row, column] += 0.5
        assert (encoder(new, timesteps)[0] != vectors).any(2).all()
    assert (encoder(x_t, timesteps + 1)[0] != vectors).any(2).all()
    hidden = normal(*vectors.shape, seed=2)
    output = decoder(hidden, skip, timesteps)
    assert (decoder(hidden, skip, timesteps + 1) != output).all()
    last = hidden.clone()
    last[:, -1] += 0.5
    assert (decoder(last, skip, timesteps) != output).any(1).all()
    for place in range(len(skip)):
        other = [part + (n == place) * normal(*part.shape, seed=4) for n, part in enumerate(skip)]
        assert (decoder(hidden, tuple(other), timesteps) != output).any(1).all()


@pytest.mark.parametrize("k", SIDES)
def test_images_do_not_mix(k: int) -> None:
    encoder, decoder = adapters(k)
    x_t, timesteps = normal(3, 3, 16, 8), torch.tensor([5.0, 600.0, 70.0]).double()
    vectors, skip = encoder(x_t, timesteps)
    hidden = normal(*vectors.shape, seed=2)
    output = decoder(hidden, skip, timesteps)
    for i in range(3):
        alone, own = encoder(x_t[i : i + 1], timesteps[i : i + 1])
        close(vectors[i : i + 1], alone)
        close(output[i : i + 1], decoder(hidden[i : i + 1], own, timesteps[i : i + 1]))


def test_channels_double_as_the_resolution_halves() -> None:
    assert widths_of(1, 64) == [64]
    assert widths_of(8, 1280) == [160, 320, 640, 1280]
    assert [group_norm(c).num_groups for c in (4, 8, 96, 160, 640, 1280)] == [1, 2, 8, 8, 32, 32]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 3, "latent_shape": (3, 9, 9)}, "got patch_size 3: a U-Net halves .* take 1, 2, 4 or 8"),
        ({"patch_size": 4, "adapter_channels": 40}, "got adapter_channels 40, expected a multiple of 16"),
        ({"patch_size": 4, "latent_shape": (3, 8, 10)}, "patch_size 4 does not divide the latent size 8 x 10"),
        ({"adapter_channels": 0}, "got adapter_channels 0 for adapter 'unet'"),
        (
            {"adapter": "linear", "adapter_channels": 64},
            "adapter_channels 64 for adapter 'linear': .*null for",
        ),
        ({"adapter": "u-net"}, "got adapter 'u-net', expected 'linear', 'unet' or 'conv'"),
        ({"latent_shape": None, "patch_size": None}, "got adapter 'unet' without latent_shape"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(settings: dict, message: str) -> None:
    sizes = {"latent_shape": (3, 8, 8), "patch_size": 2, "dim": 32, "num_layers": 1, "num_heads": 2, "adapter": "unet"}
    with pytest.raises(ValueError, match=message):
        Transfusion(vocab_size=40, **(sizes | settings))


def test_initial_weights_keep_the_scale_at_every_depth() -> None:
    """Patch vectors equally large at every patch side, and half-way activations neither vanish nor grow."""
    for k in SIDES:
        model = Transfusion(40, (8, 16, 16), k, 64, 1, 2, adapter="unet", adapter_channels=64).materialize("cpu", 0)
        draws = torch.Generator().manual_seed(0)
        x_t = torch.randn(4, 8, 16, 16, generator=draws)
        vectors, skip = model.patch_encoder(x_t, torch.tensor([0.0, 10.0, 500.0, 1000.0]))
        assert 0.05 < vectors.std() < 0.07
        assert all(0.8 < part.std() < 3 for part in skip)
        for name, parameter in model.patch_encoder.named_parameters():
            if "norm" in name:
                assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
