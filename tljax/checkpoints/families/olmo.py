"""OLMo 1 (``OlmoForCausalLM``): Llama with layer norms without parameters, and clipped queries, keys and values."""

from typing import Any

from tljax.checkpoints.families import llama
from tljax.checkpoints.families.llama import IGNORED, read_decoder, write_decoder
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig, attention_bias
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

EPS = 1e-5


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``OlmoConfig``."""
    clip = hf("clip_qkv", None)
    if clip is not None and clip <= 0:
        raise hf.unsupported("clip_qkv", clip, "a positive number or null")
    cfg = read_decoder(hf, eps=EPS, clip_qkv=None if clip is None else float(clip))
    return cfg.replace(normalization_type="LNPre", eps=EPS)


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``OlmoConfig`` attributes of ``cfg``."""
    attributes = write_decoder(cfg)
    del attributes["rms_norm_eps"]
    return attributes | {
        "clip_qkv": cfg.clip_qkv,
        "attention_bias": attention_bias(nonzero),
        "pad_token_id": None,  # transformers' default may lie outside a smaller vocabulary
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    return [row for row in llama.rows(hf) if not row.paths.endswith(".w")]


OLMO = Family(
    architecture="OlmoForCausalLM",
    model_type="olmo",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=11008, n_ctx=2048, d_vocab=50304),
)
