"""Small random models of every kind of block, and pairs of prompts, for tests of circuits."""

import functools

import jax
import numpy as np

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.circuits import ResidualGraph
from tljax.text.batch import Batch

ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8, "gated_mlp": True, "normalization_type": "RMS"}
KINDS = {
    "gpt2": {"normalization_type": "LN"},
    "neox": {"normalization_type": "LN", "parallel_attn_mlp": True, "positional_embedding_type": "rotary"},
    "llama": {**ROTARY, "n_key_value_heads": 2},
    "gemma2": {**ROTARY, "n_key_value_heads": 2, "use_normalization_before_and_after": True},
    "mixtral": {**ROTARY, "num_experts": 4, "experts_per_token": 2, "residual_multiplier": 0.5},
}
LENGTH = 7
Padding = str
"""``"none"``, ``"left"`` or ``"right"``."""


@functools.cache
def model_of(kind: str) -> HookedTransformer:
    """A model of two layers, every parameter random."""
    fields = {"rotary_dim": 4 if kind == "neox" else None} | KINDS[kind]
    cfg = HookedTransformerConfig(
        d_model=32, n_heads=4, d_head=8, n_layers=2, n_ctx=8, d_vocab=50, act_fn="gelu", d_mlp=48, **fields
    )
    model, keys = HookedTransformer(cfg), iter(jax.random.split(jax.random.key(0), 200))
    spread = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), model.params)
    return model.replace(params=spread)


def graph_of(kind: str) -> ResidualGraph:
    """Its graph, in mixtures with each expert as a writer."""
    return ResidualGraph.of(model_of(kind), experts=kind == "mixtral")


def mask_of(padding: Padding) -> np.ndarray:
    """Attention mask of three prompts, of which the first is shorter."""
    mask = np.ones((3, LENGTH), bool)
    mask[0] = {"none": True, "left": np.arange(LENGTH) >= 2, "right": np.arange(LENGTH) < LENGTH - 2}[padding]
    return mask


def pairs_of(padding: Padding = "none") -> tuple[Batch, Batch]:
    """Clean and corrupted prompts, which differ in the third token of each text; the same whatever the padding."""
    rng, mask = np.random.default_rng(0), mask_of(padding)
    texts = rng.integers(1, 50, (3, LENGTH))
    other = np.where(np.arange(LENGTH) == 2, (texts + rng.integers(1, 48, (3, 1))) % 49 + 1, texts)

    def placed(texts: np.ndarray) -> Batch:
        rows = [row[:length] for row, length in zip(texts, mask.sum(axis=1), strict=True)]
        return Batch.from_rows(rows, "left" if padding == "left" else "right")

    return placed(texts), placed(other)
