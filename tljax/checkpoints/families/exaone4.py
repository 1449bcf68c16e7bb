"""EXAONE 4 (``Exaone4ForCausalLM``): norms after attention and MLP, and over each head's queries and keys.

Where some layers have a window, only those rotate.
"""

from typing import Any

from tljax.checkpoints.families.cohere2 import rotating_locally
from tljax.checkpoints.families.llama import (
    GATED_MLP,
    IGNORED,
    QK_NORM,
    attention_rows,
    decoder_rows,
    read_decoder,
    read_window,
    write_decoder,
    write_layer_types,
)
from tljax.checkpoints.families.olmo2 import norms_after
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``Exaone4Config``."""
    size, period = hf("sliding_window", 4096, null=None), hf("sliding_window_pattern", None)
    period = 4 if period is None else period
    if isinstance(period, str):  # such as "LLLG": only where layer_types says it again
        hf("layer_types")
        period = 1
    layers = range(hf("num_hidden_layers"))
    window = read_window(hf, size, [bool(period) and (layer + 1) % period != 0 for layer in layers])
    return read_decoder(
        hf,
        kv_heads=32,
        eps=1e-5,
        use_normalization_after_only=True,
        use_qk_norm=True,
        rotary_layers=rotating_locally(hf, window) if window else None,
        default_prepend_bos=False,
        **window,
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``Exaone4Config`` attributes of ``cfg``."""
    return write_decoder(cfg) | {"sliding_window": cfg.window_size, "layer_types": write_layer_types(cfg)}


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    return norms_after(decoder_rows(hf, [*attention_rows(qkv_bias=False, out_bias=False), *QK_NORM], GATED_MLP))


EXAONE4 = Family(
    architecture="Exaone4ForCausalLM",
    model_type="exaone4",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=16384, n_ctx=2048, d_vocab=102400),
)
