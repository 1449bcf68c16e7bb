"""Tiny models of every kind that the hook table knows, drawn with numpy so that building one compiles nothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.modules.stack import init_params

BASE = {"d_model": 16, "n_layers": 2, "n_heads": 4, "d_head": 8, "n_ctx": 12, "d_vocab": 13, "act_fn": "gelu_new"}
ROTARY = {"positional_embedding_type": "rotary"}

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "neox": {**ROTARY, "act_fn": "gelu", "rotary_dim": 4, "parallel_attn_mlp": True},
    "llama": {
        **ROTARY, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "n_key_value_heads": 2,
    },
    "attn_only": {"attn_only": True},
    "solu_ln": {"act_fn": "solu_ln"},
    "no_norm": {"normalization_type": None, "act_fn": "relu"},
    "soft_caps": {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 1.5},
    "local": {"use_local_attn": True, "window_size": 2, "attn_types": ("global", "local")},
    "bidirectional": {"attention_dir": "bidirectional"},
    "final_rms": {"normalization_type": "LN", "final_rms": True},
    "adjacent": {**ROTARY, "rotary_adjacent_pairs": True, "normalization_type": "LNPre"},
    "no_positions": {"positional_embedding_type": "none", "normalization_type": "RMSPre"},
    "qk_norm": {
        **ROTARY, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "n_key_value_heads": 2,
        "use_qk_norm": True,
    },
    "layer_kinds": {
        **ROTARY, "use_local_attn": True, "window_size": 3, "attn_types": ("global", "local"),
        "rotary_base_local": 50.0, "rotary_scaling_factor": 2.0,
    },
    "sandwich": {
        **ROTARY, "act_fn": "gelu_new", "gated_mlp": True, "normalization_type": "RMS", "rmsnorm_uses_offset": True,
        "use_normalization_before_and_after": True, "n_key_value_heads": 2,
    },
    "multipliers": {
        **ROTARY, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "rmsnorm_uses_offset": True,
        "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_multiplier": 0.5, "gated_mlp_bias": True,
    },
    "unrotated": {**ROTARY, "normalization_type": "RMS", "rotary_layers": (False, True)},
    "post_norm_only": {
        **ROTARY, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "n_key_value_heads": 2,
        "use_normalization_after_only": True, "use_qk_norm": True, "qk_norm_span": "joint",
    },
    "clipped": {**ROTARY, "normalization_type": "LNPre", "clip_qkv": 0.5},
    "qk_after_rotary": {
        **ROTARY, "act_fn": "xielu", "normalization_type": "RMS", "n_key_value_heads": 2, "use_qk_norm": True,
        "qk_norm_after_rotary": True,
    },
    "latent": {
        **ROTARY, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "kv_lora_rank": 6, "q_lora_rank": 7,
        "rotary_dim": 4, "d_value": 5, "rotary_adjacent_pairs": True,
    },
    "latent_keys": {**ROTARY, "kv_lora_rank": 6, "rotary_dim": 2, "d_value": 10},
    "inverse_scale": {"scale_attn_by_inverse_layer_idx": True},
    "alibi": {"positional_embedding_type": "alibi", "n_heads": 6, "post_embedding_ln": True, "clip_qkv": 0.8},
    "alibi_rounded": {"positional_embedding_type": "alibi", "alibi_rounded": True, "normalization_type": "RMS"},
    "residual_norm": {"use_normalization_of_residual": True},
    "moe": {
        **ROTARY, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "num_experts": 5,
        "experts_per_token": 2, "d_expert": 9, "d_shared_expert": 6, "gate_shared_expert": True,
        "moe_layers": (False, True),
    },
}  # fmt: skip


def randomised_params(cfg: HookedTransformerConfig, seed: int = 0) -> Any:
    """Parameters that are all random, norms and biases too: at 1 and 0 they would hide mistakes."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_norm_weight = path[-1].key == "w"
        return jnp.asarray((0.3 * rng.standard_normal(leaf.shape) + is_norm_weight).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(functools.partial(init_params, cfg)))


@functools.cache
def _build(kind: str, changes: tuple[tuple[str, Any], ...]) -> HookedTransformer:
    cfg = HookedTransformerConfig(**(BASE | VARIANTS[kind] | dict(changes)))
    return HookedTransformer(cfg, params=randomised_params(cfg))


def build(kind: str = "gpt2", **changes: Any) -> HookedTransformer:
    """A tiny random two-layer model; the same arguments give the same object."""
    return _build(kind, tuple(sorted(changes.items())))


TOKENS = np.random.default_rng(1).integers(0, 13, (2, 6)).astype(np.int32)
