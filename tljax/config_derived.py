"""Config fields that follow from others when they are not set."""

from typing import TYPE_CHECKING, Any

import numpy as np

from tljax.config_checks import PER_LAYER
from tljax.errors import ConfigError, DictionaryError
from tljax.numerics import canonical_dtype
from tljax.splice import Splice

if TYPE_CHECKING:
    from tljax.config import HookedTransformerConfig

DERIVED: dict[str, Any] = {
    "d_mlp": None, "d_expert": None, "d_vocab_out": -1, "rotary_dim": None, "attn_scale": -1.0,
    "initializer_range": -1.0,
}  # fmt: skip
"""Fields that follow from others, each with the value that marks it as not set."""
FITTED_TO_ROTARY_DIM = ("longrope_short_factor", "longrope_long_factor", "kv_lora_rank", "q_lora_rank")
"""Fields that are valid for one ``rotary_dim`` only."""


def derived_fields(cfg: "HookedTransformerConfig") -> dict[str, Any]:
    """Returns the fields that follow from others, with sequences as tuples and the dtype by its canonical name.

    Raises:
        ConfigError: the heads have no size, or do not divide ``d_model``.
    """
    heads = _heads(cfg)
    fields: dict[str, Any] = dict(heads)
    if cfg.d_mlp is None and not cfg.attn_only:
        fields["d_mlp"] = 4 * cfg.d_model
    if cfg.d_expert is None and cfg.num_experts is not None:
        fields["d_expert"] = fields.get("d_mlp", cfg.d_mlp)
    if cfg.d_vocab_out == -1:
        fields["d_vocab_out"] = cfg.d_vocab
    if cfg.rotary_dim is None and cfg.positional_embedding_type == "rotary":
        fields["rotary_dim"] = heads["d_head"]
    if not cfg.use_attn_scale:
        fields["attn_scale"] = 1.0
    elif cfg.attn_scale == -1.0:
        fields["attn_scale"] = float(np.sqrt(heads["d_head"]))
    if cfg.initializer_range < 0:
        fields["initializer_range"] = 0.8 / float(np.sqrt(cfg.d_model)) if cfg.init_mode == "gpt2" else 1.0
    if cfg.eos_token_ids is not None:
        fields["eos_token_ids"] = tuple(np.atleast_1d(np.asarray(cfg.eos_token_ids, object)).tolist())
    for name in (*PER_LAYER, "longrope_short_factor", "longrope_long_factor", "weight_processing"):
        if getattr(cfg, name) is not None:
            fields[name] = tuple(getattr(cfg, name))
    fields["splices"] = _splices(cfg.splices)
    return fields | {"dtype": canonical_dtype(cfg.dtype)}


def _splices(given: Any) -> tuple[Splice, ...]:
    """Returns splices, also those that :meth:`HookedTransformerConfig.to_dict` wrote.

    Raises:
        ConfigError: these are no splices.
    """
    try:
        return tuple(one if isinstance(one, Splice) else Splice.from_dict(one) for one in given)
    except (TypeError, LookupError, DictionaryError) as error:
        raise ConfigError(
            f"splices={given!r} must be what a spliced model's config holds: model.with_dictionaries(...).cfg.splices."
        ) from error


def _heads(cfg: "HookedTransformerConfig") -> dict[str, int]:
    """Returns ``d_head`` and ``n_heads``; either follows from the other."""
    if cfg.d_head == -1 and cfg.n_heads == -1:
        raise ConfigError("Give d_head or n_heads: neither was set, so the heads have no size.")
    for name, other in (("d_head", "n_heads"), ("n_heads", "d_head")):
        if getattr(cfg, name) == -1:
            if cfg.d_model % getattr(cfg, other):
                raise ConfigError(
                    f"d_model={cfg.d_model} is not a multiple of {other}={getattr(cfg, other)}. Give {name}."
                )
            return {name: cfg.d_model // getattr(cfg, other), other: getattr(cfg, other)}
    return {"d_head": cfg.d_head, "n_heads": cfg.n_heads}
