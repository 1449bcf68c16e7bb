"""Gemma 1 (``GemmaForCausalLM``): Llama with norm gains of ``1 + w`` and embeddings times ``sqrt(d_model)``."""

from typing import Any

from tljax.checkpoints.families import llama
from tljax.checkpoints.families.llama import IGNORED, read_decoder, write_decoder
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GemmaConfig``."""
    return read_gemma(hf, "hidden_act")


def read_gemma(hf: HFConfig, activation: str = "hidden_activation", **options: Any) -> HookedTransformerConfig:
    """Returns what all Gemmas share.

    Args:
        hf: the Hugging Face config.
        activation: which attribute names the activation; the other, which files also have, must not say another.
        **options: of :func:`tljax.checkpoints.families.llama.read_decoder`.
    """
    hf.only(use_bidirectional_attention=False)
    tanh = "gelu_pytorch_tanh"
    act_fn = hf.activation(activation, tanh)
    other = hf.activation("hidden_act" if activation == "hidden_activation" else "hidden_activation", act_fn)
    if act_fn == "gelu" and activation == "hidden_act":  # the first releases said so and meant the tanh approximation
        act_fn = tanh
    if other not in (act_fn, "gelu"):
        raise hf.unsupported(
            "(hidden_act, hidden_activation)", (hf("hidden_act", None), hf("hidden_activation", None)), "the same"
        )
    multiplier = float(hf("hidden_size") ** 0.5)
    options = {"kv_heads": 16, "rmsnorm_uses_offset": True, "embedding_multiplier": multiplier} | options
    return read_decoder(hf, d_head=256, **options).replace(act_fn=act_fn)


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
    defaults=sizes(d_model=3072, n_layers=28, n_heads=16, d_mlp=24576, n_ctx=8192, d_vocab=256000)
    | {"tie_word_embeddings": True},
)
