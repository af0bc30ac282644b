"""Mixed-modal decoding without a cache, without batches: every step runs the whole sequence again."""

from __future__ import annotations

import torch

from tfusion.randomness import generator
from tfusion.samplers import Sampler
from tfusion.sequence import BOI_ID, BOS_ID, EOI_ID, EOS_ID, NUM_SPECIAL_IDS, PAD_ID, Batch


def run(model, sequence):
    """Logits (L, V) at every position, and the network's output for each image.

    `sequence` holds token ids and (latents (C, h, w), timestep) pairs; a pair takes P positions.
    """
    P = model.num_patches
    ids, image_ids, starts = [], [], []
    for item in sequence:
        if isinstance(item, int):
            ids.append(item)
            image_ids.append(-1)
        else:
            starts.append(len(ids))
            ids += [PAD_ID] * P
            image_ids += [len(starts) - 1] * P
    images = [item for item in sequence if not isinstance(item, int)]
    I, L = max(len(images), 1), len(ids)
    dtype = model.embedding.weight.dtype
    x_t, timesteps = torch.zeros(I, *model.latent_shape, dtype=dtype), torch.zeros(I, dtype=dtype)
    for i, (latents, timestep) in enumerate(images):
        x_t[i], timesteps[i] = latents, timestep
    valid = torch.arange(I) < len(images)
    batch = Batch(
        token_ids=torch.tensor([ids]),
        document_ids=torch.zeros(1, L, dtype=torch.long),
        image_ids=torch.tensor([image_ids]),
        position_ids=torch.arange(L)[None],
        hidden=torch.zeros(1, L, dtype=torch.bool),
        text_positions=torch.arange(L),
        text_labels=torch.zeros(L, dtype=torch.long),
        image_valid=valid,
        image_rows=torch.zeros(I, dtype=torch.long),
        image_starts=torch.tensor(starts or [0]),
        noise_limits=torch.ones(I),
        time_uniforms=torch.zeros(I),
        noise=torch.zeros(I, *model.latent_shape),
        step_counts=torch.zeros(2),
    )
    with torch.no_grad():
        return model(batch, x_t, timesteps)


def choose(logits, allowed, config, draws):
    """One token by explicit sorting and counting."""
    candidates = [(float(logits[i]), -i) for i in range(len(logits)) if allowed(i)]
    candidates.sort(reverse=True)
    if config.temperature == 0:
        return -candidates[0][1]
    u = torch.rand((), generator=draws).item()
    candidates = candidates[: config.top_k or len(candidates)]
    top = candidates[0][0]
    weights = [torch.tensor((value - top) / config.temperature).exp().item() for value, _ in candidates]
    total, kept, mass = sum(weights), [], 0.0
    for weight in weights:
        if kept and mass >= (config.top_p or 1.0) * total:
            break
        kept.append(weight)
        mass += weight
    at = 0.0
    for weight, (_, minus_token) in zip(kept, candidates, strict=False):
        at += weight
        if u * mass < at:
            return -minus_token
    raise AssertionError("the weights sum to the mass")


def naive_generate(model, process, prompt, request, sample=0):
    """What a request's sample is: text ids and image latents, in order.

    `prompt` is [BOS] and what follows, as ids and clean latents.
    """
    P, config = model.num_patches, request.config
    sequence = [item if isinstance(item, int) else (item, 0.0) for item in prompt]
    draws = generator("tokens", request.seed, sample)
    out, tokens, images = [], 0, 0
    wants_image = request.generate == "image"
    while True:
        if not wants_image:
            length = sum(1 if isinstance(item, int) else P for item in sequence)

            def allowed(i, length=length, tokens=tokens, images=images):
                if i == BOI_ID:
                    return request.generate == "any" and images < config.max_new_images
                if i == EOS_ID:
                    return not (request.generate == "text" and tokens == 0)
                return i >= NUM_SPECIAL_IDS

            token = choose(run(model, sequence)[0][-1], allowed, config, draws)
            if token == EOS_ID:
                return out
            if token == BOI_ID:
                wants_image = True
                continue
            out.append(token)
            sequence.append(token)
            tokens += 1
            if tokens >= config.max_new_tokens:
                return out
            continue
        noise = generator("image", request.seed, sample, images)
        x_t = torch.randn(model.latent_shape, generator=noise).to(model.embedding.weight.dtype)[None]
        sequence.append(BOI_ID)
        null = [s for s in sequence if not isinstance(s, int) or s in (BOS_ID, BOI_ID, EOI_ID)]
        name = config.sampler or ("ddpm" if process.family == "ddpm" else "euler")
        sampler = Sampler(process, name, config.num_inference_steps)
        for index, timestep in enumerate(sampler.timesteps):
            output = run(model, [*sequence, (x_t[0], timestep)])[1][-1:]
            low, high = (end * process.num_train_timesteps for end in config.guidance_interval)
            if config.guidance_scale != 1 and low <= timestep <= high:
                without = run(model, [*null, (x_t[0], timestep)])[1][-1:]
                output = without + config.guidance_scale * (output - without)
            x_t = sampler.step(output, index, x_t, [noise])
        out.append(x_t[0])
        images += 1
        if request.generate == "image":
            return out
        sequence += [(x_t[0], 0.0), EOI_ID]
        wants_image = False
