"""HunYuan, dense (``HunYuanDenseV1ForCausalLM``): Llama whose queries and keys are normalised after rotation."""

from typing import Any

from tljax.checkpoints.families import llama
from tljax.checkpoints.families.llama import (
    BLOCK,
    GATED_MLP,
    IGNORED,
    attention_rows,
    decoder_rows,
    read_decoder,
)
from tljax.checkpoints.family import Family, sizes
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig

QK_NORM = (
    Row(f"{BLOCK}.self_attn.query_layernorm.weight", "d_head", "blocks.{l}.attn.q_norm.w"),
    Row(f"{BLOCK}.self_attn.key_layernorm.weight", "d_head", "blocks.{l}.attn.k_norm.w"),
)
_UNUSED = ("type", "rope_type", "alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``HunYuanDenseV1Config``."""
    hf.only(use_qk_norm=True, use_cla=False, mlp_bias=False, num_experts=1, norm_type="rms", use_rotary_pos_emb=True)
    hf.only(
        add_classification_head=False, attention_head_dim=hf("head_dim", hf("hidden_size") // hf("num_attention_heads"))
    )
    cfg = read_decoder(_without_alpha(hf), eps=1e-5, use_qk_norm=True, qk_norm_after_rotary=True)
    alpha = _alpha(hf)
    return cfg if alpha is None else cfg.replace(rotary_base=cfg.rotary_base * alpha ** (cfg.d_head / (cfg.d_head - 2)))


def _rope(hf: HFConfig) -> dict[str, Any]:
    return dict(hf("rope_parameters", {})) | dict(hf("rope_scaling", {}))


def _alpha(hf: HFConfig) -> float | None:
    """Returns ``alpha``, a fixed stretch of the base despite the type ``"dynamic"``, or ``None`` if there is none."""
    rope = _rope(hf)
    kind = rope.get("rope_type", rope.get("type"))
    return float(rope["alpha"]) if kind == "dynamic" and rope.get("alpha") else None


def _without_alpha(hf: HFConfig) -> HFConfig:
    """Returns the config with the rotation it would have without ``alpha``."""
    if _alpha(hf) is None:
        return hf
    left = {key: value for key, value in _rope(hf).items() if key not in _UNUSED}
    return hf.changed(rope_parameters=left, rope_scaling=None)


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``HunYuanDenseV1Config`` attributes of ``cfg``."""
    return llama.write_config(cfg, nonzero) | {
        "pad_token_id": None,  # transformers' default may lie outside a smaller vocabulary
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    biased = hf("attention_bias", False)
    return decoder_rows(hf, [*attention_rows(biased, biased), *QK_NORM], GATED_MLP)


HUNYUAN = Family(
    architecture="HunYuanDenseV1ForCausalLM",
    model_type="hunyuan_v1_dense",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    ignored=IGNORED,
    defaults=sizes(d_model=4096, n_layers=32, n_heads=32, d_mlp=11008, n_ctx=2048, d_vocab=290943),
    inert={
        "layers that share keys and values, where use_cla is on": "cla_share_factor",
        "a head for classes, where add_classification_head is on": "class_num dense_list pool_type",
        "special tokens, of images and text too": """
            pad_id im_start_id im_end_id im_newline_id text_start_id text_end_id mask_init_id
        """,
        "the vocabulary before it was padded": "org_vocab_size",
    },
)
