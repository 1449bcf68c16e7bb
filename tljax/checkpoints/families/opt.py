"""OPT and Galactica (``OPTForCausalLM``): the first two of the position embeddings are unused; 350m is another kind.

OPT-350m normalises the residual stream itself after each addition, has no final norm, and has narrower embeddings with
projections between them and the residual stream.
"""

from typing import Any

from tljax.checkpoints.families.layers import attention, head, layer_norm, mlp
from tljax.checkpoints.family import Family
from tljax.checkpoints.formats.hf_config import HFConfig
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig


def read_config(hf: HFConfig) -> HookedTransformerConfig:
    """Returns our config for an ``OPTConfig``."""
    width = hf("hidden_size")
    before, embedding_width = hf("do_layer_norm_before", True), hf("word_embed_proj_dim", width)
    if before:
        hf.only(word_embed_proj_dim=width, _remove_final_layer_norm=False)
    else:
        hf("_remove_final_layer_norm", False)  # there is none to remove
    hf.only(learned_embeddings=True, scale_embeddings=False)  # Galactica's
    hf.only(output_projection=True)  # of the larger ones
    return HookedTransformerConfig(
        d_model=width,
        n_layers=hf("num_hidden_layers"),
        n_heads=hf("num_attention_heads"),
        n_ctx=hf("max_position_embeddings"),
        d_vocab=hf("vocab_size"),
        d_mlp=hf("ffn_dim"),
        act_fn=hf.activation("activation_function", "relu"),
        eps=1e-5,
        normalization_type="LN" if hf("layer_norm_elementwise_affine", True) else "LNPre",
        positional_embedding_type="standard",
        use_normalization_of_residual=not before,
        d_embed=None if embedding_width == width else embedding_width,
    )


def write_config(cfg: HookedTransformerConfig, nonzero: frozenset[str]) -> dict[str, Any]:
    """Returns the ``OPTConfig`` attributes of ``cfg``."""
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "max_position_embeddings": cfg.n_ctx,
        "vocab_size": cfg.d_vocab,
        "ffn_dim": cfg.d_mlp,
        "activation_function": cfg.act_fn,
        "word_embed_proj_dim": cfg.d_embed or cfg.d_model,
        "do_layer_norm_before": not cfg.use_normalization_of_residual,
        "enable_bias": bool(nonzero - {"unembed.b_U"}),
        "layer_norm_elementwise_affine": cfg.normalization_type == "LN",
    }


def rows(hf: HFConfig) -> list[Row]:
    """Returns the table: checkpoint tensor, its axes, our parameters."""
    embedding, block = "model.decoder.embed_tokens.weight", "model.decoder.layers.{l}"
    biased, tied = hf("enable_bias", True), hf("tie_word_embeddings", True)
    narrow = hf("word_embed_proj_dim", hf("hidden_size")) != hf("hidden_size")
    ends = [Row(embedding, "d_vocab d_model", "embed.W_E"), *head(embedding, tied=tied)]
    if narrow:
        ends = [
            Row(embedding, "d_vocab d_embed", "embed.W_E"),
            Row("model.decoder.project_in.weight", "d_model d_embed", "embed.W_proj"),
            Row("model.decoder.project_out.weight", "d_embed d_model", "unembed.W_proj"),
            Row("lm_head.weight", "d_vocab_out d_embed", "unembed.W_U", tied_to=embedding if tied else None),
        ]
    table = [
        *ends,
        Row("model.decoder.embed_positions.weight", "n_ctx d_model", "pos_embed.W_pos", skip=2),
        *layer_norm(f"{block}.self_attn_layer_norm", "blocks.{l}.ln1"),
        *attention(f"{block}.self_attn", biased=biased, out_biased=biased),
        *layer_norm(f"{block}.final_layer_norm", "blocks.{l}.ln2"),
        *mlp(f"{block}.fc1", f"{block}.fc2", biased=biased),
    ]
    if hf("do_layer_norm_before", True):
        table.extend(layer_norm("model.decoder.final_layer_norm", "ln_final"))
    affine = hf("layer_norm_elementwise_affine", True)
    return table if affine else [row for row in table if "layer_norm" not in row.key]


OPT = Family(
    architecture="OPTForCausalLM",
    model_type="opt",
    read_config=read_config,
    write_config=write_config,
    rows=rows,
    prefix="model.",
    defaults={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
        "ffn_dim": 3072,
    },
    inert={"of a test's settings; word_embed_proj_dim is read": "embed_dim"},
)
