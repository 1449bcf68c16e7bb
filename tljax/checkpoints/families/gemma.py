"""Gemma 1 (``GemmaForCausalLM``): Llama with norm gains of ``1 + w`` and embeddings times ``sqrt(d_model)``."""

from typing import Any

from tljax.checkpoints.families import llama
from tljax.checkpoints.families.llama import IGNORED, read_decoder, write_decoder
from tljax.checkpoints.hf_config import HFConfig, attention_bias
from tljax.checkpoints.mapping import Family
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GemmaConfig``."""
    return read_gemma(hf)


def read_gemma(hf: HFConfig, **options: Any) -> HookedTransformerConfig:
    """Returns what all Gemmas share; ``options`` go to :func:`tljax.checkpoints.families.llama.read_decoder`."""
    hf.only(use_bidirectional_attention=False)
    activation = hf.activation("hidden_activation", hf("hidden_act", "gelu_pytorch_tanh"))
    if activation == "gelu":  # the first releases said so and meant the approximation by tanh
        activation = "gelu_pytorch_tanh"
    multiplier = float(hf("hidden_size") ** 0.5)
    options = {"kv_heads": 16, "rmsnorm_uses_offset": True, "embedding_multiplier": multiplier} | options
    return read_decoder(hf, d_head=256, **options).replace(act_fn=activation)


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``GemmaConfig`` attributes of ``cfg``."""
    return write_decoder(cfg) | {"attention_bias": attention_bias(nonzero)}


GEMMA = Family(
    architecture="GemmaForCausalLM",
    model_type="gemma",
    read_config=read_config,
    write_config=write_config,
    rows=llama.rows,
    prefix="model.",
    ignored=IGNORED,
)
