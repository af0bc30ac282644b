"""Patches are windows in raster order; the adapters are strided convolutions, plus the timestep."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tfusion.models.patches import (
    LinearPatchDecoder,
    LinearPatchEncoder,
    TimestepEmbedding,
    num_patches,
    patchify,
    unpatchify,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHAPES = [((3, 8, 8), 2), ((8, 6, 10), 2), ((1, 4, 4), 4), ((2, 3, 5), 1), ((4, 12, 6), 3)]


@pytest.mark.parametrize(("latent_shape", "k"), SHAPES)
def test_unpatchify_is_the_inverse(latent_shape: tuple[int, int, int], k: int) -> None:
    x = normal(2, *latent_shape)
    patches = patchify(x, k)
    assert patches.shape == (2, num_patches(latent_shape, k), latent_shape[0] * k * k)
    assert torch.equal(unpatchify(patches, latent_shape, k), x)
    y = normal(*patches.shape, seed=1)
    assert torch.equal(patchify(unpatchify(y, latent_shape, k), k), y)


@pytest.mark.parametrize(("latent_shape", "k"), SHAPES)
def test_raster_order(latent_shape: tuple[int, int, int], k: int) -> None:
    """Left to right, then top to bottom; a window's values by channel, row, column."""
    x = normal(2, *latent_shape)
    C, h, w = latent_shape
    patches, p = patchify(x, k), 0
    for top in range(0, h, k):
        for left in range(0, w, k):
            for image in range(2):
                window = [x[image, c, top + i, left + j] for c in range(C) for i in range(k) for j in range(k)]
                assert patches[image, p].tolist() == [float(value) for value in window]
            p += 1
    assert p == num_patches(latent_shape, k) == patches.shape[1]


@pytest.mark.parametrize(
    ("latent_shape", "k", "divisors"),
    [((3, 8, 9), 2, "1"), ((3, 9, 6), 2, "1, 3"), ((8, 32, 32), 3, "1, 2, 4, 8, 16, 32"), ((3, 4, 4), 8, "1, 2, 4")],
)
def test_a_patch_that_does_not_divide_is_refused(latent_shape: tuple[int, int, int], k: int, divisors: str) -> None:
    size = f"{latent_shape[1]} x {latent_shape[2]}"
    refusal = f"patch_size {k} does not divide the latent size {size}: take {divisors}, or another image size"
    with pytest.raises(ValueError, match=refusal):
        num_patches(latent_shape, k)


@pytest.mark.parametrize("k", [0, -2])
def test_a_patch_of_no_size_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"patch_size {k}"):
        num_patches((3, 8, 8), k)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    module = module.double()
    for i, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=10 + i) * parameter.shape[-1] ** -0.5
    for part in module.modules():
        if isinstance(part, TimestepEmbedding):
            part.fill_buffers()
    return module


@pytest.mark.parametrize(("latent_shape", "k"), SHAPES)
def test_encoder_is_a_strided_convolution_plus_the_timestep(latent_shape: tuple[int, int, int], k: int) -> None:
    encoder = randomised(LinearPatchEncoder(latent_shape, k, 16))
    x_t, timesteps = normal(3, *latent_shape), torch.tensor([0.0, 17.5, 999.0]).double()
    kernel = encoder.proj.weight.view(16, latent_shape[0], k, k)
    convolved = torch.nn.functional.conv2d(x_t, kernel, encoder.proj.bias, stride=k)  # (I, D, h/k, w/k)
    expected = convolved.flatten(2).transpose(1, 2) + encoder.timestep(timesteps)[:, None]
    torch.testing.assert_close(encoder(x_t, timesteps)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("latent_shape", "k"), SHAPES)
def test_decoder_is_a_transposed_convolution(latent_shape: tuple[int, int, int], k: int) -> None:
    C, h, w = latent_shape
    decoder = randomised(LinearPatchDecoder(latent_shape, k, 16))
    hidden = normal(3, num_patches(latent_shape, k), 16)
    grid = hidden.transpose(1, 2).reshape(3, 16, h // k, w // k)
    kernel = decoder.proj.weight.T.reshape(16, C, k, k)
    expected = torch.nn.functional.conv_transpose2d(grid, kernel, stride=k)
    expected = expected + unpatchify(decoder.proj.bias.expand(3, hidden.shape[1], -1), latent_shape, k)
    torch.testing.assert_close(decoder(hidden, (), None), expected, rtol=1e-10, atol=1e-10)


def test_timestep_embedding_is_sinusoids_and_two_layers() -> None:
    module = randomised(TimestepEmbedding(8))
    for t in (0.0, 1.0, 321.25, 1000.0):
        angles = [t * 10_000 ** (-i / 128) for i in range(128)]
        waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]).double()
        inner = module.in_proj.weight @ waves + module.in_proj.bias
        expected = module.out_proj.weight @ (inner * inner.sigmoid()) + module.out_proj.bias
        torch.testing.assert_close(module(torch.tensor([t]).double())[0], expected, rtol=1e-6, atol=1e-6)


def test_neighbouring_timesteps_differ_with_bf16_weights() -> None:
    """The angles stay in fp32: in bf16 999 and 1000 are one number."""
    module = randomised(TimestepEmbedding(8))
    module.frequencies = module.frequencies.float()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    a, b = module(torch.tensor([999.0, 1000.0]))
    assert a.dtype == torch.bfloat16
    assert not torch.equal(a, b)


def test_images_do_not_mix() -> None:
    encoder = randomised(LinearPatchEncoder((3, 4, 4), 2, 16))
    x_t, timesteps = normal(3, 3, 4, 4), torch.tensor([5.0, 6.0, 7.0]).double()
    for i in range(3):
        alone = encoder(x_t[i : i + 1], timesteps[i : i + 1])[0]
        torch.testing.assert_close(encoder(x_t, timesteps)[0][i : i + 1], alone, rtol=1e-10, atol=1e-10)
