"""Small models hosted in TransformerLens's own format: their config.json, and two older layouts.

Neel Nanda's toys (``attn-only-*``, ``gelu-*``, ``solu-*``), Redwood's two-layer model and Othello-GPT are torch pickles
beside a config.json with TransformerLens's names. The SoLU models trained on the Pile are older: their norms have other
names, and with up to eight layers some tensors are transposed. Othello-GPT keeps minGPT's names.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from tljax.checkpoints.formats import transformer_lens
from tljax.checkpoints.rows import Row
from tljax.config import HookedTransformerConfig
from tljax.errors import UnsupportedModelError

OLD, MINGPT = "neel-solu-old", "mingpt"
_NEEDED = ("d_model", "n_layers", "n_heads", "d_head", "n_ctx", "d_vocab")
_POSITIONS_TURNED, _WEIGHTS_TURNED = 8, 6
"""Largest layer counts at which an old model's position table, or all its weights, have the last two axes swapped."""

_MINGPT = (
    Row("tok_emb.weight", "d_vocab d_model", "embed.W_E"),
    Row("pos_emb", "1 n_ctx d_model", "pos_embed.W_pos"),
    Row("blocks.{l}.ln1.weight", "d_model", "blocks.{l}.ln1.w"),
    Row("blocks.{l}.ln1.bias", "d_model", "blocks.{l}.ln1.b"),
    Row("blocks.{l}.attn.query.weight", "(n_heads d_head) d_model", "blocks.{l}.attn.W_Q"),
    Row("blocks.{l}.attn.query.bias", "(n_heads d_head)", "blocks.{l}.attn.b_Q"),
    Row("blocks.{l}.attn.key.weight", "(n_kv d_head) d_model", "blocks.{l}.attn.W_K"),
    Row("blocks.{l}.attn.key.bias", "(n_kv d_head)", "blocks.{l}.attn.b_K"),
    Row("blocks.{l}.attn.value.weight", "(n_kv d_head) d_model", "blocks.{l}.attn.W_V"),
    Row("blocks.{l}.attn.value.bias", "(n_kv d_head)", "blocks.{l}.attn.b_V"),
    Row("blocks.{l}.attn.proj.weight", "d_model (n_heads d_head)", "blocks.{l}.attn.W_O"),
    Row("blocks.{l}.attn.proj.bias", "d_model", "blocks.{l}.attn.b_O"),
    Row("blocks.{l}.ln2.weight", "d_model", "blocks.{l}.ln2.w"),
    Row("blocks.{l}.ln2.bias", "d_model", "blocks.{l}.ln2.b"),
    Row("blocks.{l}.mlp.0.weight", "d_mlp d_model", "blocks.{l}.mlp.W_in"),
    Row("blocks.{l}.mlp.0.bias", "d_mlp", "blocks.{l}.mlp.b_in"),
    Row("blocks.{l}.mlp.2.weight", "d_model d_mlp", "blocks.{l}.mlp.W_out"),
    Row("blocks.{l}.mlp.2.bias", "d_model", "blocks.{l}.mlp.b_out"),
    Row("ln_f.weight", "d_model", "ln_final.w"),
    Row("ln_f.bias", "d_model", "ln_final.b"),
    Row("head.weight", "d_vocab_out d_model", "unembed.W_U"),
)


def is_hosted(attributes: Mapping[str, Any]) -> bool:
    """Whether a config.json has TransformerLens's keys, and none of transformers' that name a class."""
    foreign = attributes.get("model_type") or attributes.get("architectures")
    return not foreign and all(name in attributes for name in _NEEDED)


def read_config(attributes: Mapping[str, Any]) -> HookedTransformerConfig:
    """Returns our config for such a config.json.

    TransformerLens, too, reads only the keys that are read here; all others are training settings.

    Raises:
        ConfigError: a value does not fit.
        UnsupportedModelError: other positions or attention than hosted models have.
    """
    for key, only in (("use_local_attn", False), ("attention_dir", "causal"), ("use_attn_scale", True)):
        if attributes.get(key, only) != only:
            raise UnsupportedModelError(f"config.json has {key}={attributes[key]!r}: hosted models have {only!r}.")
    positions = attributes.get("positional_embedding_type", "standard")
    if "shortformer_pos" in attributes:
        positions = "shortformer" if attributes["shortformer_pos"] else "standard"
    attn_only = bool(attributes.get("attn_only", False))
    norm = attributes["normalization"] if "normalization" in attributes else attributes.get("normalization_type", "LN")
    return HookedTransformerConfig(
        **{name: attributes[name] for name in _NEEDED},
        d_mlp=None if attn_only else attributes.get("d_mlp"),
        act_fn=attributes.get("act_fn"),
        attn_only=attn_only,
        final_rms=bool(attributes.get("final_rms", False)),
        normalization_type=norm,
        eps=attributes.get("ln_eps", attributes.get("eps", 1e-5)),
        positional_embedding_type=positions,
        original_architecture=attributes.get("architecture", "neel"),
    )


def rows(cfg: HookedTransformerConfig, attributes: Mapping[str, Any], stored: Iterable[str]) -> list[Row]:
    """Returns the table of such a checkpoint; biases that it does not store are zero, as in TransformerLens.

    Args:
        cfg: its config.
        attributes: its config.json.
        stored: names of its tensors, which show whether the layout is an older one.
    """
    if attributes.get("architecture") == MINGPT:
        return list(_MINGPT)
    table = transformer_lens.rows(cfg, optional_biases=True)
    is_old = attributes.get("architecture") == OLD or any("norm" in name for name in stored)
    return [_as_of_old(row, cfg.n_layers) for row in table] if is_old else table


def _as_of_old(row: Row, n_layers: int) -> Row:
    """Returns a row with the name and axes that it has in the SoLU models trained on the Pile."""
    key = row.key.replace("ln_final", "norm").replace("ln", "norm")
    axes = row.axes.split()
    leaf = key.rpartition(".")[2]
    if leaf.startswith("W_") and n_layers <= (_POSITIONS_TURNED if leaf == "W_pos" else _WEIGHTS_TURNED):
        axes[-2:] = axes[:-3:-1]
    return Row(key, " ".join(axes), row.paths, aka=None if key == row.key else row.key, other=row.other)
