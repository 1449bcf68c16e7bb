"""Published config.json files at a tiny size: every key is kept, only sizes are shrunk, consistently."""

import math
from collections.abc import Mapping
from typing import Any

LAYERS, HEADS, VOCAB, WINDOW, EXPERTS, CONTEXT, TEXT = 4, 4, 48, 5, 8, 64, 12
ORIGINAL = 8
"""A context before it was stretched: shorter than the tests' texts, so that factors for long texts count."""
LONGER = {"phimoe": 16}
"""The same where transformers 5.24 takes the factors of short texts for all: the publishers' code does not."""
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "n_embed")
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_MLPS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern", "layer_switch")
_LISTS = ("layer_types", "no_rope_layers", "attention_layers", "mlp_layer_types")
_WHEN_GIVEN = {
    "kv_lora_rank": 12, "moe_intermediate_size": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "qk_head_dim": 10,
    "v_head_dim": 8, "q_lora_rank": 14, "sliding_window": WINDOW, "sliding_window_size": WINDOW, "window_size": WINDOW,
    "shared_expert_intermediate_size": 20, "first_k_dense_replace": 1, "vocab_size": VOCAB,
}  # fmt: skip


def shrink(published: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the file with every key that it has, and none that it has not, of a tiny model of the same make."""
    tiny = dict(published)
    tiny |= {name: small for name, small in _WHEN_GIVEN.items() if published.get(name)}
    _shrink_heads(published, tiny)
    _shrink_layers(published, tiny)
    _shrink_experts(published, tiny)
    _shrink_context(published, tiny)
    for name in published:
        if name.endswith("token_id") and isinstance(published[name], int):
            tiny[name] = min(published[name], VOCAB - 1)
    return tiny


def _first(published: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((published[name] for name in names if published.get(name)), None)


def _shrink_heads(published: Mapping[str, Any], tiny: dict[str, Any]) -> None:
    width, heads = _first(published, _WIDTHS), _first(published, _HEADS)
    rotated = _rotated(published)
    d_head = next(d for d in (8, 10, 16, 20, 24) if d * rotated % 2 == 0)
    own = published.get("head_dim")
    if own is not None and own * heads != width:  # a head's width is its own: so let it be here
        d_head, d_model = next(d for d in (12, 16, 20, 24) if d * rotated % 2 == 0), 32
    else:
        d_model = HEADS * d_head
    if "qk_rope_head_dim" in published:
        d_head, d_model = 4, 32
    tiny |= {name: d_model for name in _WIDTHS if name in published}
    tiny |= {name: HEADS for name in _HEADS if name in published}
    tiny |= {name: d_head for name in ("head_dim", "kv_channels", "attention_head_dim") if published.get(name)}
    for name in ("num_key_value_heads", "num_kv_heads"):
        if (kv_heads := published.get(name)) is not None:
            tiny[name] = HEADS if kv_heads == heads else min(kv_heads, 2)
    for name in _MLPS:
        if published.get(name):
            tiny[name] = 4 * d_model if published[name] == 4 * width else 44
    if "word_embed_proj_dim" in published:
        tiny["word_embed_proj_dim"] = d_model if published["word_embed_proj_dim"] == width else 20
    if "rotary_dim" in published:
        tiny["rotary_dim"] = 4
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := published.get(name), dict):
            pairs = int(d_head * rotated) // 2
            tiny[name] = rope | {key: rope[key][:pairs] for key in ("short_factor", "long_factor") if key in rope}


def _rotated(published: Mapping[str, Any]) -> float:
    rope = published.get("rope_parameters") or {}
    named = {"phi": 0.5, "gpt_neox": 0.25, "stablelm": 0.25, "nemotron": 0.5, "glm4": 0.5, "glm4_moe": 0.5}
    given = (published.get(name) for name in ("partial_rotary_factor", "rotary_pct"))
    fractions = [*given, rope.get("partial_rotary_factor"), named.get(published.get("model_type", ""), 1.0)]
    return next(fraction for fraction in fractions if fraction is not None)


def _shrink_layers(published: Mapping[str, Any], tiny: dict[str, Any]) -> None:
    tiny |= {name: LAYERS for name in _LAYERS if name in published}
    tiny |= {name: published[name][:LAYERS] for name in _LISTS if published.get(name)}
    tiny |= {name: 2 for name in _PATTERNS if isinstance(published.get(name), int)}
    if isinstance(kinds := published.get("layer_types"), list) and len(set(kinds[:LAYERS])) < len(set(kinds)):
        tiny["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    if "attention_types" in published:
        kinds, _ = published["attention_types"][0]
        tiny["attention_types"] = [[kinds, LAYERS // len(kinds)]]
    if (first := published.get("max_window_layers")) is not None:
        tiny["max_window_layers"] = LAYERS if first >= _first(published, _LAYERS) else LAYERS // 2


def _shrink_experts(published: Mapping[str, Any], tiny: dict[str, Any]) -> None:
    for name in _EXPERTS:
        if published.get(name):
            tiny[name] = min(published[name], EXPERTS)
    for name in ("num_experts_per_tok", "experts_per_token"):
        if published.get(name):
            tiny[name] = min(published[name], 3)
    if (published.get("n_group") or 1) > 1:
        tiny |= {"n_group": 4, "topk_group": min(published["topk_group"], 2)}


def _shrink_context(published: Mapping[str, Any], tiny: dict[str, Any]) -> None:
    ropes = [tiny[name] for name in ("rope_scaling", "rope_parameters") if isinstance(tiny.get(name), dict)]
    own, before = "original_max_position_embeddings", LONGER.get(published.get("model_type", ""), ORIGINAL)
    original = next((place[own] for place in (published, *ropes) if place.get(own)), None)
    whole = _first(published, _CONTEXTS)
    context = CONTEXT if original is None or whole is None else max(16, math.ceil(before * whole / original))
    tiny |= {name: context for name in _CONTEXTS if name in published}
    if published.get(own):
        tiny[own] = before
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(tiny.get(name), dict) and tiny[name].get(own):
            tiny[name] = tiny[name] | {own: before}
