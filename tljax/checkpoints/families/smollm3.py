"""SmolLM3 (``SmolLM3ForCausalLM``): Llama in which every fourth layer does not rotate."""

from typing import Any

from tljax.checkpoints.families import llama, qwen2
from tljax.checkpoints.families.llama import IGNORED, read_decoder, read_mlp_bias, read_window
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``SmolLM3Config``."""
    n_layers, interval = hf("num_hidden_layers"), hf("no_rope_layer_interval", 4)
    rotates = hf("no_rope_layers", [(layer + 1) % interval != 0 for layer in range(n_layers)])
    if len(rotates) != n_layers:
        raise hf.unsupported("no_rope_layers", rotates, f"one entry for each of {n_layers} layers")
    size = hf("sliding_window", None) if hf("use_sliding_window", False) else None
    window = read_window(hf, size, [not layer for layer in rotates])
    rotating = None if all(rotates) else tuple(map(bool, rotates))
    return read_decoder(hf, kv_heads=4, theta=2e6, rotary_layers=rotating, **read_mlp_bias(hf), **window)


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``SmolLM3Config`` attributes of ``cfg``."""
    rotates = cfg.rotary_layers or (True,) * cfg.n_layers
    return qwen2.write_config(cfg, nonzero) | {
        "attention_bias": attention_bias(nonzero),
        "mlp_bias": cfg.gated_mlp_bias,
        "pad_token_id": None,  # transformers' default may lie outside a smaller vocabulary
        "no_rope_layers": [int(layer) for layer in rotates],
    }


SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    read_config=read_config,
    write_config=write_config,
    rows=llama.rows_with_mlp_bias,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=2048, n_layers=36, n_heads=16, d_mlp=11008, n_ctx=32768, d_vocab=128256)
    | {"tie_word_embeddings": True},
    inert={"layers with a window follow from no_rope_layers or layer_types": "max_window_layers"},
)
