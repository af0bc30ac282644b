"""Chameleon decoding without a cache, without batches: every step runs the whole sequence of ids again."""

from __future__ import annotations

import torch

from tests.reference.generation import choose
from tfusion.randomness import generator
from tfusion.sequence import BOI_ID, BOS_ID, EOI_ID, EOS_ID, NUM_SPECIAL_IDS


def logits_after(model, ids):
    """(V + K,) behind the last of some ids."""
    L = len(ids)
    mask = torch.ones(L, L, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        x = model.embedding.weight[torch.tensor([ids])]
        return model.head(model.transformer(x, torch.arange(L)[None], mask))[0, -1]


class ImageSettings:
    """What `choose` reads, of image ids."""

    def __init__(self, config):
        self.temperature, self.top_k, self.top_p = (config.image_temperature, config.image_top_k, config.image_top_p)


def naive_generate(model, prompt, request, sample=0):
    """What a request's sample is: text ids, and tuples of P codes, in order. `prompt` is [BOS] and what follows."""
    P, V, config = model.num_patches, model.vocab_size, request.config
    sequence, out, tokens, images = list(prompt), [], 0, 0
    draws = generator("tokens", request.seed, sample)
    wants_image = request.generate == "image"
    while True:
        if not wants_image:

            def allowed(i, tokens=tokens, images=images):
                if i == BOI_ID:
                    return request.generate == "any" and images < config.max_new_images
                if i == EOS_ID:
                    return not (request.generate == "text" and tokens == 0)
                return NUM_SPECIAL_IDS <= i < V

            token = choose(logits_after(model, sequence), allowed, config, draws)
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
        of_image = generator("image", request.seed, sample, images)
        sequence.append(BOI_ID)
        null = [i for i in sequence if i >= V or i in (BOS_ID, BOI_ID, EOI_ID)]
        codes = []
        for _ in range(P):
            logits = logits_after(model, sequence)
            if config.guidance_scale != 1:
                without = logits_after(model, null)
                logits = without + config.guidance_scale * (logits - without)
            token = choose(logits, lambda i: i >= V, ImageSettings(config), of_image)
            sequence.append(token)
            null.append(token)
            codes.append(token - V)
        out.append(tuple(codes))
        images += 1
        if request.generate == "image":
            return out
        sequence.append(EOI_ID)
        wants_image = False
