"""Small random models with random dictionaries, and brute force by hooks, for tests of feature attribution."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.dictionaries import Dictionary, DictionaryConfig, Tap
from tljax.patching import LogitDiff

D_MODEL, LENGTH, VOCAB = 16, 6, 23
TOKENS = np.random.default_rng(0).integers(1, VOCAB, (2, LENGTH))
OTHERS = np.where(np.arange(LENGTH) == 1, TOKENS % (VOCAB - 1) + 1, TOKENS)
METRIC = LogitDiff(3, 7)


def dictionary(
    reads: str, writes: str | None = None, *, d_sae: int = 20, seed: int = 0, dtype: str = "float32", **fields: Any
) -> Dictionary:
    """A random dictionary with some features active and some not; a transcoder if it writes elsewhere."""
    rng = np.random.default_rng(seed)
    d_in = fields.pop("d_in", D_MODEL)
    params = {
        "W_enc": rng.normal(size=(d_in, d_sae)) / d_in**0.5, "b_enc": rng.normal(size=d_sae) * 0.1,
        "W_dec": rng.normal(size=(d_sae, d_in)) / d_sae**0.5, "b_dec": rng.normal(size=d_in) * 0.1,
    }  # fmt: skip
    if writes is not None:
        fields |= {"transcoder": True, "apply_b_dec_to_input": False}
    if fields.get("architecture") == "jumprelu":
        params["threshold"] = np.abs(rng.normal(size=d_sae)) * 0.2
    tap = Tap(reads=reads, writes=writes, merged_heads=reads.endswith("hook_z"))
    cfg = DictionaryConfig(d_in=d_in, d_sae=d_sae, tap=tap, **fields)
    return Dictionary({name: value.astype(dtype) for name, value in params.items()}, cfg)


@functools.cache
def plain_model(**fields: Any) -> HookedTransformer:
    """A model of three layers, every parameter random."""
    usual = {"normalization_type": "LN", "act_fn": "gelu", "d_mlp": 24} | fields
    cfg = HookedTransformerConfig(d_model=D_MODEL, n_heads=2, d_head=8, n_layers=3, n_ctx=8, d_vocab=VOCAB, **usual)
    model, keys = HookedTransformer(cfg), iter(jax.random.split(jax.random.key(0), 200))
    params = model.params
    spread = jax.tree.map(lambda leaf: leaf + 0.25 * jax.random.normal(next(keys), leaf.shape, leaf.dtype), params)
    return model.replace(params=spread)


def dictionaries() -> list[Dictionary]:
    """Dictionaries of several kinds, widths and points, two of them in one block."""
    return [
        dictionary("blocks.0.hook_resid_pre", seed=1),
        dictionary("blocks.1.hook_attn_out", seed=2, d_sae=24),
        dictionary("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", seed=3),
        dictionary("blocks.2.hook_resid_pre", seed=4, architecture="topk", k=5),
        dictionary("blocks.2.hook_resid_post", seed=5, d_sae=28, architecture="jumprelu"),
    ]


@functools.cache
def smooth_model(**fields: Any) -> HookedTransformer:
    """The model with two dictionaries that nothing but ReLU makes nonlinear, whose errors pass gradients on."""
    given = [dictionary("blocks.1.hook_attn_out", seed=2, d_sae=24), dictionary("blocks.2.hook_resid_pre", seed=3)]
    return plain_model(**fields).with_dictionaries(given, gradient="pass")


@functools.cache
def spliced_model(error: str = "keep", gradient: str = "stop") -> HookedTransformer:
    """The model with all of these dictionaries."""
    options: Any = {"error": error, "gradient": gradient}
    return plain_model().with_dictionaries(dictionaries(), **options)


def with_value(model: HookedTransformer, tokens: Any, changes: dict[str, Any]) -> np.ndarray:
    """The metric of each prompt with activations replaced, by a whole pass with hooks."""
    hooks = [(name, lambda activation, hook: jnp.asarray(changes[hook.name], activation.dtype)) for name in changes]
    return np.asarray(METRIC(model.run_with_hooks(tokens, fwd_hooks=hooks)), np.float64)
