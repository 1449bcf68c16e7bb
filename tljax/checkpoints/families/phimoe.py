"""Phi-3.5-MoE (``PhimoeForCausalLM``): layer norms, and experts chosen one after the other.

Its long rope divides by the long factors beyond ``original_max_position_embeddings`` tokens, as in Phi 3; there
transformers 5 keeps the short ones.
"""

from typing import Any

from tljax.checkpoints.families import experts, layers
from tljax.checkpoints.families.llama import BLOCK, IGNORED, attention_rows, read_decoder, read_window, write_decoder
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

_MOE = f"{BLOCK}.block_sparse_moe"
_EMBEDDING = "model.embed_tokens.weight"


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``PhimoeConfig``."""
    hf = _with_attention_factor(hf)
    size = hf("sliding_window", None)
    cfg = read_decoder(
        hf,
        kv_heads=8,
        eps=1e-5,
        theta=1e6,
        num_experts=hf("num_local_experts", 16),
        experts_per_token=hf("num_experts_per_tok", 2),
        router="sparsemixer",
        router_jitter=hf("router_jitter_noise", 0.01),
        **read_window(hf, size, [True] * hf("num_hidden_layers")),
    )
    return cfg.replace(normalization_type="LN")


def _with_attention_factor(hf: HFConfig) -> HFConfig:
    """Returns the config with long rope's attention factor under its usual name; here short and long texts have one."""
    rope = dict(hf("rope_parameters", {})) | dict(hf("rope_scaling", {}))
    if "short_mscale" not in rope and "long_mscale" not in rope:
        return hf
    short, long = (rope.pop(name, None) for name in ("short_mscale", "long_mscale"))
    if short != long:
        raise hf.unsupported("(short_mscale, long_mscale)", (short, long), "the same for both")
    return hf.changed(rope_parameters=rope | {"attention_factor": short}, rope_scaling=None)


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``PhimoeConfig`` attributes of ``cfg``."""
    attributes = write_decoder(cfg)
    if cfg.uses_longrope:
        both = dict.fromkeys(("short_mscale", "long_mscale"), cfg.longrope_attention_factor)
        attributes["rope_scaling"] = attributes["rope_scaling"] | both
    return attributes | {
        "sliding_window": cfg.window_size,
        "num_local_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.experts_per_token,
        "router_jitter_noise": cfg.router_jitter,
        "attention_bias": attention_bias(nonzero),
        "lm_head_bias": "unembed.b_U" in nonzero,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    return [
        Row(_EMBEDDING, "d_vocab d_model", "embed.W_E"),
        *layers.layer_norm(f"{BLOCK}.input_layernorm", "blocks.{l}.ln1"),
        *attention_rows(biased, biased),
        *layers.layer_norm(f"{BLOCK}.post_attention_layernorm", "blocks.{l}.ln2"),
        experts.router(f"{_MOE}.gate.weight", aka=f"{BLOCK}.mlp.router.weight"),
        *experts.one_by_one(_MOE, "w1", "w3", "w2"),
        *layers.layer_norm("model.norm", "ln_final"),
        *layers.head(_EMBEDDING, tied=hf("tie_word_embeddings", False), biased=hf("lm_head_bias", False)),
    ]


PHIMOE = Family(
    architecture="PhimoeForCausalLM",
    model_type="phimoe",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=6400, n_ctx=131072, d_vocab=32064),
    own_code="phimoe|slimmoe",
)
