"""Random dictionaries, and a tiny model with one at every kind of point, for tests of spliced models."""

from typing import Any

import numpy as np
from variants import build

from tljax import HookedTransformer
from tljax.dictionaries import Dictionary, DictionaryConfig

MODEL = build("gpt2", n_layers=3)
TRANSCODED = ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")


def dictionary(d_in: int = 16, d_sae: int = 9, *, seed: int = 0, dtype: Any = np.float32, **fields: Any) -> Dictionary:
    """A random dictionary; a transcoder has a skip connection."""
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= {"threshold": (d_sae,)} if fields.get("architecture") == "jumprelu" else {}
    if fields.get("transcoder"):
        fields["apply_b_dec_to_input"] = False
        shapes["W_skip"] = (d_in, d_in)
    params = {name: (0.4 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}
    return Dictionary(params, DictionaryConfig(d_in=d_in, d_sae=d_sae, **fields))


def everywhere() -> dict[Any, Dictionary]:
    """A dictionary at every kind of point, at most one in the way of another."""
    return {
        "hook_embed": dictionary(seed=1),
        "blocks.0.hook_resid_post": dictionary(seed=2, architecture="jumprelu"),
        "blocks.1.attn.hook_z": dictionary(32, seed=3, architecture="topk", k=4),
        TRANSCODED: dictionary(seed=4, transcoder=True),
        "blocks.2.hook_resid_pre": dictionary(seed=5, normalize_activations="layer_norm"),
        "blocks.2.attn.hook_v": dictionary(32, seed=6),
        "blocks.2.hook_resid_post": dictionary(seed=7),
    }


def spliced(**options: Any) -> HookedTransformer:
    """The model with :func:`everywhere` spliced in."""
    return MODEL.with_dictionaries(everywhere(), **options)
