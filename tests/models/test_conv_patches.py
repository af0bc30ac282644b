"""The convolutional adapter's blocks are torchvision's ConvNeXt; its long skip, the time, and its size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlock

from tests.models.test_patches import normal
from tests.models.test_unet_patches import close, randomised
from tfusion.models.conv_patches import ConvNeXtBlock, ConvPatchDecoder, ConvPatchEncoder
from tfusion.models.patches import patchify, unpatchify

SHAPES = [((3, 8, 12), 2), ((8, 4, 4), 1), ((2, 9, 6), 3)]


def test_a_block_is_torchvisions() -> None:
    ours = randomised(ConvNeXtBlock(12))
    theirs = CNBlock(12, layer_scale=1.0, stochastic_depth_prob=0.0, norm_layer=nn.LayerNorm).double()
    for module, place in ((ours.depthwise, 0), (ours.norm, 2), (ours.up_proj, 3), (ours.down_proj, 5)):
        theirs.block[place].load_state_dict(module.state_dict())
    x = normal(2, 20, 12)
    grid = x.transpose(1, 2).reshape(2, 12, 4, 5)
    close(ours(x, (4, 5)), theirs(grid).flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_the_way_in_and_out(shape: tuple[int, int, int], k: int) -> None:
    """Patches, time, two blocks, a linear layer; out: what the trunk says beside what was skipped, the same back."""
    encoder, decoder = (
        randomised(ConvPatchEncoder(shape, k, 24, 10, True)),
        randomised(ConvPatchDecoder(shape, k, 24, 10)),
    )
    grid = (shape[1] // k, shape[2] // k)
    x_t, timesteps = normal(3, *shape), torch.tensor([0.0, 55.0, 999.0]).double()
    x = encoder.in_proj(patchify(x_t, k)) + encoder.timestep(timesteps)[:, None]
    x = encoder.blocks[1](encoder.blocks[0](x, grid), grid)
    vectors, skip = encoder(x_t, timesteps)
    close(vectors, encoder.proj(encoder.norm(x)) + encoder.positions.weight)
    [features] = skip
    close(features, x)
    hidden = normal(*vectors.shape, seed=1)
    x = hidden @ decoder.in_proj.weight[:, :24].T + features @ decoder.in_proj.weight[:, 24:].T + decoder.in_proj.bias
    x = decoder.blocks[1](decoder.blocks[0](x, grid), grid)
    close(decoder(hidden, skip, timesteps), unpatchify(decoder.proj(decoder.norm(x)), shape, k))


def test_images_do_not_mix() -> None:
    encoder, decoder = (
        randomised(ConvPatchEncoder((3, 8, 8), 2, 24, 10)),
        randomised(ConvPatchDecoder((3, 8, 8), 2, 24, 10)),
    )
    x_t, timesteps = normal(3, 3, 8, 8), torch.tensor([5.0, 600.0, 70.0]).double()
    vectors, skip = encoder(x_t, timesteps)
    output = decoder(vectors, skip, timesteps)
    for i in range(3):
        alone, own = encoder(x_t[i : i + 1], timesteps[i : i + 1])
        close(vectors[i : i + 1], alone)
        close(output[i : i + 1], decoder(alone, own, timesteps[i : i + 1]))
