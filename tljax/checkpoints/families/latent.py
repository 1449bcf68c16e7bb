"""Rows of latent attention and of DeepSeek's mixtures of experts, and what their configs share."""

import math
from typing import Any

from tljax.checkpoints.families import experts, layers
from tljax.checkpoints.families.llama import BLOCK, GATED_MLP, decoder_rows, write_decoder
from tljax.checkpoints.formats.hf_config import HFConfig, yarn_mscale
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

_BIASES = frozenset({"attn.b_Q_down", "attn.b_KV_down", "attn.b_K_rot", "attn.b_O"})
FURTHER_TOKENS = {
    "further layers that guess tokens further ahead, which transformers does not run": """
        num_nextn_predict_layers num_mtp_layers
    """
}
"""Attributes that are inert in models with such layers."""


def read_latent(
    hf: HFConfig,
    *,
    sparse: tuple[bool, ...],
    query_rank: int,
    value_width: int,
    unrotated: int,
    interleaved: bool,
    eps: float = 1e-6,
    **fields: Any,
) -> HookedTransformerConfig:
    """Returns our config from the attributes that models with latent attention share.

    Args:
        hf: the Hugging Face config.
        sparse: which layers have experts.
        query_rank: ``q_lora_rank`` where it is absent; an explicit null means none.
        value_width: default of ``v_head_dim``.
        unrotated: default of ``qk_nope_head_dim``.
        interleaved: whether neighbouring dimensions rotate as a pair.
        eps: default of ``rms_norm_eps``; that of the latents' norms is always 1e-6.
        **fields: the rest of our config.
    """
    n_heads = hf("num_attention_heads")
    hf.only(num_key_value_heads=n_heads)
    rotary_dim = hf("qk_rope_head_dim", 64)
    d_head = hf("qk_nope_head_dim", unrotated) + rotary_dim
    hf.only(head_dim=rotary_dim, qk_head_dim=d_head)
    return HookedTransformerConfig(
        d_model=hf("hidden_size"),
        n_layers=hf("num_hidden_layers"),
        n_heads=n_heads,
        d_head=d_head,
        d_value=hf("v_head_dim", value_width),
        kv_lora_rank=hf("kv_lora_rank", 512),
        q_lora_rank=hf("q_lora_rank", query_rank, null=None),
        n_ctx=hf("max_position_embeddings"),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("intermediate_size"),
        act_fn=hf.activation("hidden_act", "silu"),
        gated_mlp=True,
        eps=hf("rms_norm_eps", eps),
        normalization_type="RMS",
        rotary_adjacent_pairs=interleaved,
        attn_scale=math.sqrt(d_head) / _sharpening(hf),
        moe_layers=experts.unless_all(sparse),
        **hf.rotary(rotary_dim),
        **fields,
    )


def read_experts(
    hf: HFConfig, *, routed: int, shared: int, width: int, scaling: float = 1.0, per_token: int | None = None
) -> dict[str, Any]:
    """Returns our fields of the experts, given the defaults of a family."""
    chosen = hf("num_experts_per_tok") if per_token is None else hf("num_experts_per_tok", per_token)
    d_expert = hf("moe_intermediate_size", width)
    return {
        "num_experts": hf("n_routed_experts", routed, aka=("num_experts", "num_local_experts")),
        "experts_per_token": chosen,
        "d_expert": d_expert,
        "d_shared_expert": d_expert * hf("n_shared_experts", shared),
        "routed_scaling_factor": hf("routed_scaling_factor", scaling),
    }


def read_groups(hf: HFConfig, groups: int | None = None, of_them: int | None = None) -> dict[str, Any]:
    """Returns our fields of the groups that experts are chosen in, given the defaults of a family."""
    n_groups = hf("n_group") if groups is None else hf("n_group", groups)
    chosen = hf("topk_group") if of_them is None else hf("topk_group", of_them)
    return {"expert_groups": n_groups, "expert_groups_per_token": chosen} if n_groups > 1 else {}


def read_sigmoid_router(hf: HFConfig, groups: int, of_them: int) -> dict[str, Any]:
    """Returns our fields of DeepSeek 3's router, given the defaults of its groups."""
    hf.only(topk_method="noaux_tc", scoring_func="sigmoid")
    return {"router": "sigmoid", "norm_topk_prob": hf("norm_topk_prob", True), **read_groups(hf, groups, of_them)}


def leading_dense(hf: HFConfig, default: int) -> tuple[bool, ...]:
    """Returns which layers have experts: all after the first ``first_k_dense_replace``."""
    hf.only(moe_layer_freq=1)
    dense = hf("first_k_dense_replace", default)
    return tuple(layer >= dense for layer in range(hf("num_hidden_layers")))


def write_latent(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the attributes that :func:`read_latent`, :func:`read_experts` and :func:`read_groups` read back."""
    rotary_dim = cfg.rotary_dim or 0
    attributes = write_decoder(cfg) | {
        "head_dim": rotary_dim,
        "qk_rope_head_dim": rotary_dim,
        "qk_nope_head_dim": cfg.d_head - rotary_dim,
        "v_head_dim": cfg.value_width,
        "kv_lora_rank": cfg.kv_lora_rank,
        "q_lora_rank": cfg.q_lora_rank,
        "attention_bias": not nonzero.isdisjoint(_BIASES),
    }
    attributes |= write_experts(cfg)
    if cfg.use_yarn_rope:
        attributes["rope_scaling"]["mscale_all_dim"] = _mscale_all_dim(cfg)
    return attributes


def write_experts(cfg: HookedTransformerConfig) -> dict[str, Any]:
    """Returns the attributes that :func:`read_experts` and :func:`read_groups` read back."""
    return {
        "n_routed_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.experts_per_token,
        "moe_intermediate_size": cfg.d_expert,
        "n_shared_experts": (cfg.d_shared_expert or 0) // (cfg.d_expert or 1),
        "routed_scaling_factor": cfg.routed_scaling_factor,
        "norm_topk_prob": cfg.norm_topk_prob,
        "n_group": cfg.expert_groups or 1,
        "topk_group": cfg.expert_groups_per_token or 1,
    }


def count_dense(cfg: HookedTransformerConfig) -> int:
    """Returns how many layers have no experts: ``first_k_dense_replace``, where they are the first ones."""
    return sum(not kind.experts for kind in cfg.layer_kinds)


def latent_rows(hf: HFConfig, sparse: tuple[bool, ...], *, chooses_by_bias: bool) -> list[Row]:
    """Returns the table.

    Args:
        hf: the Hugging Face config.
        sparse: which layers have experts.
        chooses_by_bias: whether the router has a bias for the choice.
    """
    return decoder_rows(hf, _attention_rows(hf), mlp_rows(sparse, chooses_by_bias=chooses_by_bias))


def mlp_rows(sparse: tuple[bool, ...], *, chooses_by_bias: bool) -> list[Row]:
    """Returns the rows of mixtures of experts, and of MLPs in the layers without."""
    key = f"{BLOCK}.mlp"
    mixture = [
        experts.router(f"{key}.gate.weight"),
        *experts.one_by_one(key),
        *experts.shared(f"{key}.shared_experts"),
    ]
    if chooses_by_bias:
        mixture.append(Row(f"{key}.gate.e_score_correction_bias", "n_experts", f"{experts.MLP}.b_choice"))
    return experts.by_layer(sparse, mixture, GATED_MLP)


def _attention_rows(hf: HFConfig) -> list[Row]:
    key, ours, biased = f"{BLOCK}.self_attn", "blocks.{l}.attn", hf("attention_bias", False)
    if hf("q_lora_rank", 1, null=None) is None:
        queries = [Row(f"{key}.q_proj.weight", "(n_heads d_head) d_model", f"{ours}.W_Q")]
    else:
        queries = [
            *layers.linear(f"{key}.q_a_proj", "q_rank d_model", f"{ours}.W_Q_down", biased=biased),
            Row(f"{key}.q_a_layernorm.weight", "q_rank", f"{ours}.q_latent_norm.w"),
            Row(f"{key}.q_b_proj.weight", "(n_heads d_head) q_rank", f"{ours}.W_Q_up"),
        ]
    down = f"{ours}.W_KV_down|W_K_rot"
    return [
        *queries,
        *layers.linear(f"{key}.kv_a_proj_with_mqa", "kv_rank+d_rotary d_model", down, biased=biased),
        Row(f"{key}.kv_a_layernorm.weight", "kv_rank", f"{ours}.kv_latent_norm.w"),
        Row(f"{key}.kv_b_proj.weight", "(n_heads d_unrotated+d_value) kv_rank", f"{ours}.W_K_up|W_V_up"),
        *layers.linear(f"{key}.o_proj", "d_model (n_heads d_value)", f"{ours}.W_O", biased=biased),
    ]


def _sharpening(hf: HFConfig) -> float:
    """Returns YaRN's factor on attention scores, which ``mscale_all_dim`` sets; 1 without it."""
    rope = {**hf("rope_parameters", {}), **hf("rope_scaling", {})}
    weight = rope.get("mscale_all_dim")
    return yarn_mscale(float(rope["factor"]), float(weight)) ** 2 if weight and rope.get("factor") else 1.0


def _mscale_all_dim(cfg: HookedTransformerConfig) -> float:
    """Returns the ``mscale_all_dim`` of a config, rounded because it is computed from a square root."""
    if cfg.yarn_factor <= 1:
        return 0.0
    sharpening = math.sqrt(math.sqrt(cfg.d_head) / cfg.attn_scale)
    return round((sharpening - 1) / (yarn_mscale(cfg.yarn_factor) - 1), 9)
