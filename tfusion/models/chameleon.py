"""Chameleon: one transformer over one vocabulary of text and image ids (arXiv 2405.09818), Transfusion's rival.

An image is the P ids that a vector-quantised autoencoder gives it, and the next id is predicted, whatever it is of:
image id c stands at V + c of one embedding and one head, and all attention is causal. Packing, rows and trunk are
Transfusion's, and the trunk's names, so that its weights fit where the parts below are off; embedding and head have V
+ K rows in place of V, and the head is called `head`.

What holds it stable, each to be switched: norms of queries and keys (RMSNorm here, LayerNorm there), norms behind
attention and feed-forward (§2.3); the z-loss is the trainer's.

Legend: B rows, T positions, D width, I image slots, P ids an image, h, w their grid, V ids of text, K of images,
N labelled text positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfusion.losses import head_losses
from tfusion.models.attention import Backend, training_mask
from tfusion.models.base import MultimodalModel, image_positions
from tfusion.models.transformer import Checkpointing, NormOrder, Transformer
from tfusion.sequence import PAD_ID, Batch


class Chameleon(MultimodalModel):
    """The transformer over ids.

    Args:
        vocab_size: V, ids of text: the 5 special ids and the tokenizer's.
        codebook_size: K, ids of images (Transfusion's paper: 16,384).
        latent_shape: (1, h, w), the grid of an image's ids (paper: 32 x 32).
        dim: D.
        num_layers: blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads; None = num_heads.
        hidden_dim: feed-forward width; None = Llama's 8/3 D.
        max_seq_len: T, the longest sequence (paper: 4096).
        qk_norm: RMSNorm on queries and keys.
        norm_order: `post` = x + norm(f(x)), Swin Transformer V2's; `pre` = x + f(norm(x)), Llama's and Transfusion's.
        rope_theta: base of the rotary frequencies.
        norm_eps: of every RMSNorm.
        attention_backend: of training; None = flex attention on CUDA, SDPA elsewhere.
        activation_checkpointing: what the backward pass computes again, as Transfusion's.

    Raises:
        ValueError: sizes that do not divide, or a latent_shape of other than one channel.
    """

    latent_parts = ("embedding", "head")

    def __init__(
        self,
        vocab_size: int,
        codebook_size: int,
        latent_shape: tuple[int, int, int],
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        max_seq_len: int = 4096,
        qk_norm: bool = True,
        norm_order: NormOrder = "post",
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        attention_backend: Backend | None = None,
        activation_checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__()
        latent_shape = tuple(latent_shape)
        if len(latent_shape) != 3 or latent_shape[0] != 1 or min(latent_shape) < 1:
            raise ValueError(
                f"got latent_shape {latent_shape}, expected (1, h, w): the grid of ids that a VQTokenizer gives"
            )
        if codebook_size < 1:
            raise ValueError(f"got codebook_size {codebook_size}, expected that of the image tokenizer, at least 1")
        self.vocab_size, self.codebook_size, self.latent_shape = vocab_size, codebook_size, latent_shape
        self.num_patches = latent_shape[1] * latent_shape[2]
        self.max_seq_len, self.attention_backend, self.norm_order = max_seq_len, attention_backend, norm_order
        with torch.device("meta"):  # shapes only; `materialize` fills them in
            self.embedding = nn.Embedding(vocab_size + codebook_size, dim)
            self.transformer = Transformer(
                dim,
                num_layers,
                num_heads,
                num_kv_heads,
                hidden_dim,
                max_seq_len,
                qk_norm,
                rope_theta,
                norm_eps,
                activation_checkpointing,
                norm_order,
            )
            self.head = nn.Linear(dim, vocab_size + codebook_size, bias=False)

    def forward(self, batch: Batch, latents: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """One training forward.

        Args:
            batch: packed rows.
            latents: (I, 1, h, w) whole numbers below K, anything in empty slots.
            labels: (N + I P,) ids, or `IGNORE_INDEX`; None where logits are wanted.

        Returns:
            logits (N + I P, V + K) over all ids: at the labelled text positions, then where each image's ids are
            predicted, at BOI the first, at each id the next. With labels, nll and log^2 Z of each instead (N + I P,),
            and logits are never there all at once.
        """
        (B, T), P = batch.token_ids.shape, self.num_patches
        assert PAD_ID == 0, "what stands at patches: ids are added to it"
        ids = self.ids_of(latents) * batch.image_valid[:, None]  # (I, P); empty slots add 0 at position 0
        ids = batch.token_ids.view(-1).index_add(0, image_positions(batch, P), ids.view(-1)).view(B, T)
        mask = training_mask(
            batch.document_ids, self.seen_together(batch.image_ids), batch.hidden, self.attention_backend
        )
        x = self.transformer(self.embedding(ids), batch.position_ids, mask).view(B * T, -1)
        predicts = torch.cat([batch.text_positions, image_positions(batch, P, shift=-1)])
        hidden = x.index_select(0, predicts)  # (N + I P, D)
        return self.head(hidden) if labels is None else head_losses(hidden, self.head.weight, labels)

    def initial_gain(self, name: str) -> float:
        """0 for norms behind attention and feed-forward, as in Swin Transformer V2: blocks begin as the identity.

        At 1 each of them would drown the embeddings, and what stands where would be learned late: with 6 layers the
        text loss of 150 steps was 5.0 instead of 4.5.
        """
        behind = name.endswith(("attention_norm.weight", "feed_forward_norm.weight"))
        return 0.0 if self.norm_order == "post" and behind else 1.0

    def ids_of(self, latents: Tensor) -> Tensor:
        """Codes (I, 1, h, w) as ids of the one vocabulary, (I, P) int64."""
        return latents.flatten(1).round().long() + self.vocab_size

    def latents_of(self, ids: Tensor) -> Tensor:
        """The inverse, (I, P) -> (I, 1, h, w) float32."""
        return (ids - self.vocab_size).view(-1, *self.latent_shape).float()

    def seen_together(self, image_ids: Tensor) -> Tensor:
        """Nothing is: all attention is causal."""
        return torch.full_like(image_ids, -1)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """What text comes next, as if image ids were none: (..., D) -> (..., V)."""
        return self.head(hidden)[..., : self.vocab_size]

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Which code comes next inside an image: (..., D) -> (..., K)."""
        return self.head(hidden)[..., self.vocab_size :]
