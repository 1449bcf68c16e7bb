"""Gemma 2 (``Gemma2ForCausalLM``): Gemma with norms before and after, soft caps and a window in every other layer."""

from typing import Any

from tljax.checkpoints.families import gemma, llama
from tljax.checkpoints.families.llama import BLOCK, IGNORED, read_window, write_layer_types
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

NORMS = {"ln1_post": "post_attention_layernorm", "ln2": "pre_feedforward_layernorm",
         "ln2_post": "post_feedforward_layernorm"}  # fmt: skip


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Gemma2Config``."""
    size = hf("sliding_window", 4096)
    hf.only(sliding_window_size=size)  # says it again
    window = read_window(hf, size, [layer % 2 == 0 for layer in range(hf("num_hidden_layers"))])
    return read_sandwich(hf, 50.0, 30.0, **window)


def read_sandwich(
    hf: HFConfig, scores_cap: float | None, logits_cap: float | None, **options: Any
) -> HookedTransformerConfig:
    """Returns what Gemma 2 and 3 share, given default soft caps and options of :func:`gemma.read_gemma`."""
    return gemma.read_gemma(
        hf,
        kv_heads=4,
        use_normalization_before_and_after=True,
        attn_scale=float(hf("query_pre_attn_scalar", 256.0) ** 0.5),
        attn_scores_soft_cap=_cap(hf("attn_logit_softcapping", scores_cap, null=None)),
        output_logits_soft_cap=_cap(hf("final_logit_softcapping", logits_cap, null=None)),
        **options,
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Gemma2Config`` attributes of ``cfg``."""
    return gemma.write_config(cfg, nonzero) | {
        "hidden_activation": cfg.act_fn,
        "query_pre_attn_scalar": _whole(cfg.attn_scale**2),
        "attn_logit_softcapping": cfg.attn_scores_soft_cap if cfg.attn_scores_soft_cap > 0 else None,
        "final_logit_softcapping": cfg.output_logits_soft_cap if cfg.output_logits_soft_cap > 0 else None,
        "sliding_window": cfg.window_size,
        "layer_types": write_layer_types(cfg),
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    return with_norms(llama.rows(hf))


def with_norms(table: list[Row]) -> list[Row]:
    """Returns a decoder's table with Gemma's four norms a block instead of two."""
    kept = [row for row in table if row.paths != "blocks.{l}.ln2.w"]
    return kept + [Row(f"{BLOCK}.{key}.weight", "d_model", f"blocks.{{l}}.{ours}.w") for ours, key in NORMS.items()]


def _whole(value: float) -> int | float:
    """Returns the nearest integer if ``value``, a square, differs from it only by rounding error, else ``value``."""
    return round(value) if abs(value - round(value)) < 1e-6 else value


def _cap(value: float | None) -> float:
    return -1.0 if value is None else float(value)


GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=2304, n_layers=26, n_heads=8, d_mlp=9216, n_ctx=8192, d_vocab=256000)
    | {"tie_word_embeddings": True},
)
