"""GPT-Neo (``GPTNeoForCausalLM``): as GPT-2, but scores are not scaled and some layers see only a window."""

from typing import Any

from tljax.checkpoints.families.layers import attention, head, layer_norm, mlp
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for a ``GPTNeoConfig``."""
    hf.only(rotary=False)  # written into copies of GPT-J under this family's name
    groups = hf("attention_types", [[["global", "local"], 12]])
    if (said := sum(len(kinds) * times for kinds, times in groups)) != (n_layers := hf("num_layers")):
        raise CheckpointError(f"{hf.origin} sets attention_types of {said} layers, but its num_layers={n_layers}.")
    layers = [kind for kinds, times in groups for kind in list(kinds) * times]
    if (listed := hf("attention_layers", layers)) != layers:
        raise CheckpointError(f"{hf.origin} sets attention_layers={listed}, but its attention_types say {layers}.")
    window = hf("window_size", 256)
    return HookedTransformerConfig(
        d_model=hf("hidden_size"),
        n_layers=n_layers,
        n_heads=hf("num_heads"),
        n_ctx=hf("max_position_embeddings"),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("intermediate_size", None),
        act_fn=hf.activation("activation_function", "gelu_new"),
        eps=hf("layer_norm_epsilon", 1e-5),
        use_attn_scale=False,
        use_local_attn="local" in layers,
        attn_types=tuple(layers) if "local" in layers else None,
        window_size=window if "local" in layers else None,
        normalization_type="LN",
        positional_embedding_type="standard",
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``GPTNeoConfig`` attributes of ``cfg``."""
    layers = ["local" if kind.local else "global" for kind in cfg.layer_kinds]
    return {
        "hidden_size": cfg.d_model,
        "num_layers": cfg.n_layers,
        "num_heads": cfg.n_heads,
        "max_position_embeddings": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "intermediate_size": cfg.d_mlp,
        "activation_function": cfg.act_fn,
        "layer_norm_epsilon": cfg.eps,
        "attention_types": [[layers, 1]],
        "attention_layers": layers,
        "window_size": cfg.window_size or 256,
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding = "transformer.wte.weight"
    block = "transformer.h.{l}"
    return [
        Row(embedding, "d_vocab d_model", "embed.W_E"),
        Row("transformer.wpe.weight", "n_ctx d_model", "pos_embed.W_pos"),
        *layer_norm(f"{block}.ln_1", "blocks.{l}.ln1"),
        *attention(f"{block}.attn.attention", biased=False, out_biased=True),
        *layer_norm(f"{block}.ln_2", "blocks.{l}.ln2"),
        *mlp(f"{block}.mlp.c_fc", f"{block}.mlp.c_proj"),
        *layer_norm("transformer.ln_f", "ln_final"),
        *head(embedding, tied=hf("tie_word_embeddings", True)),
    ]


GPT_NEO = Family(
    architecture="GPTNeoForCausalLM",
    model_type="gpt_neo",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="transformer.",
    ignored=(r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)",),
    defaults={
        "hidden_size": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "max_position_embeddings": 2048,
        "vocab_size": 50257,
    },
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
)
