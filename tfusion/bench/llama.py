"""`transformers`' Llama of our trunk's size, writing with its static cache: what text is measured beside.

Same width, depth, heads, feed-forward width and vocabulary, own matrices for embedding and head: parameter for
parameter our model without its patches. Its weights are of the type that is timed, made so before. `generate` is timed,
`cache_implementation="static"`, greedy, in the two ways it has:

- `eager`: as `generate` runs on a CPU.
- `compiled`: as it runs on CUDA, where it compiles the forward of one new token by itself (not the prompt's). On a CPU
  it does not, so it is told to: the flag is its own, for tests. Compiling falls into the warm-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LogitsProcessor

from tfusion.bench.setting import DEVICE, Sizes, parameters_of
from tfusion.models.transformer import default_hidden_dim
from tfusion.sequence import BOS_ID, NUM_SPECIAL_IDS

COMPILER = "inductor"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Choices(LogitsProcessor):
    """Counts the forwards of a call: each is followed by one choice of tokens. (A hook would be compiled with it.)"""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.count += 1
        return scores


class Llama:
    """The model, and what is timed of it.

    Args:
        max_seq_len: positions of prompt and text together.

    Attributes:
        about: which model it is, for the report.
        calls: how often it ran in the last call of each way.
    """

    def __init__(self, sizes: Sizes, max_seq_len: int) -> None:
        config = LlamaConfig(
            vocab_size=sizes.vocab + NUM_SPECIAL_IDS,
            hidden_size=sizes.dim,
            intermediate_size=default_hidden_dim(sizes.dim),
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            max_position_embeddings=max_seq_len,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=BOS_ID,
            eos_token_id=None,  # no text ends before it must
        )
        self.model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[sizes.dtype]).to(DEVICE).eval()
        self.about = {
            "package": "transformers",
            "version": transformers.__version__,
            "params": parameters_of(self.model),
        }
        self.calls: dict[str, int] = {}

    def writers(self, prompts: Tensor, num_tokens: int) -> dict[str, Callable[[], Tensor]]:
        """Both ways to write behind BOS and prompts (R, n) of bytes; each gives (R, 1 + n + num_tokens) ids."""
        ids = torch.nn.functional.pad(prompts + NUM_SPECIAL_IDS, (1, 0), value=BOS_ID).to(DEVICE)
        compiling = CompileConfig(backend=COMPILER)
        compiling._compile_all_devices = True
        ways: dict[str, dict[str, Any]] = {
            "eager": {"disable_compile": True},
            "compiled": {"compile_config": compiling},
        }
        return {name: self._writer(name, ids, num_tokens, way) for name, way in ways.items()}

    def _writer(self, name: str, ids: Tensor, num_tokens: int, way: dict[str, Any]) -> Callable[[], Tensor]:
        def write() -> Tensor:
            choices = Choices()
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                cache_implementation="static",
                logits_processor=[choices],
                **way,
            )
            self.calls[name] = choices.count
            return written

        return write
