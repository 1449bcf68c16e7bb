"""Gemma 3, text (``Gemma3ForCausalLM``): Gemma 2 without soft caps, with normalised queries and keys.

Five of six layers see a window, and rotate by a base of their own.
"""

from typing import Any

from tljax.checkpoints.families import gemma2
from tljax.checkpoints.families.llama import (
    GATED_MLP,
    IGNORED,
    QK_NORM,
    attention_rows,
    decoder_rows,
    read_window,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``Gemma3TextConfig``."""
    period = hf("sliding_window_pattern", hf("_sliding_window_pattern", 6))
    local = [(layer + 1) % period != 0 for layer in range(hf("num_hidden_layers"))]
    return gemma2.read_sandwich(
        hf,
        None,
        None,
        theta=1e6,
        layer_type=GLOBAL,
        use_qk_norm=True,
        rotary_base_local=_local_base(hf),
        **read_window(hf, hf("sliding_window", 4096), local),
    )


def _local_base(hf: HFConfig) -> float:
    base = hf("rope_local_base_freq", 10000.0)
    own = dict((hf("rope_parameters", {}) or {}).get(LOCAL) or {})
    if own.pop("rope_type", "default") != "default":
        raise hf.unsupported(f"rope_parameters[{LOCAL!r}]", hf("rope_parameters")[LOCAL], "rope_type 'default'")
    return float(own.get("rope_theta", base))


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Gemma3TextConfig`` attributes of ``cfg``."""
    attributes = gemma2.write_config(cfg, nonzero)
    scaling = attributes.pop("rope_scaling") or {"rope_type": "default"}
    return attributes | {
        "rope_parameters": {
            GLOBAL: scaling | {"rope_theta": attributes.pop("rope_theta")},
            LOCAL: {"rope_type": "default", "rope_theta": cfg.rotary_base_local},
        }
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    return gemma2.with_norms(decoder_rows(hf, [*attention_rows(biased, biased), *QK_NORM], GATED_MLP))


GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=2304, n_layers=26, n_heads=8, d_mlp=9216, n_ctx=131072, d_vocab=262208)
    | {"tie_word_embeddings": True},
)
