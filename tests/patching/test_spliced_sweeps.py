"""Sweeps of spliced models: every site equals a full run with that one patch."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from spliced import TRANSCODED, dictionary, spliced
from variants import TOKENS

from tljax import Replace, Zero
from tljax.errors import InputError
from tljax.forward.stages import _apply_compiled
from tljax.patching import LogProb, ablation_sweep, sweep

CLEAN = TOKENS[:, :6]
CORRUPTED = np.where(np.arange(6) == 2, (CLEAN + 4) % 13, CLEAN)
METRIC = LogProb(3)
POINTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "features": ("blocks.2.hook_resid_pre.hook_sae_acts_post", ("pos", "feature")),
    "features of the output": ("blocks.2.hook_resid_post.hook_sae_acts_post", ("feature",)),
    "features of a transcoder": (f"{TRANSCODED[1]}.hook_sae_acts_post", ("pos", "feature")),
    "features of merged heads": ("attn.hook_z.hook_sae_acts_post", ("pos", "feature")),
    "features of values": ("hook_v.hook_sae_acts_post", ("pos", "feature")),
    "features of the embedding": ("hook_embed.hook_sae_acts_post", ("pos", "feature")),
    "outputs": ("blocks.0.hook_resid_post.hook_sae_output", ("pos",)),
    "the stream after blocks": ("resid_post", ("pos",)),
    "the stream before blocks": ("resid_pre", ("pos",)),
    "MLPs": ("mlp_out", ("pos",)),
    "heads": ("z", ("pos", "head")),
}


@pytest.mark.parametrize("error", ["keep", "drop"])
def test_sweeps_equal_full_runs(error: Any) -> None:
    """Every fifth site of each sweep, and one run for them all."""
    model = spliced(error=error, exclude_tokens=[int(CLEAN[0, 1])])
    _, clean = model.run_with_cache(CLEAN)
    table = {point.name: point for point in model.hook_points()}
    for what, (name, axes) in POINTS.items():
        result = sweep(model, CORRUPTED, clean, METRIC, name, axes, progress=False, reduce="none")
        names = [full for full in table if full == name or full.endswith((f".{name}", f"hook_{name}"))]
        names = [full for full in names if table[full].axes == table[names[0]].axes]
        shape = np.asarray(result.values).shape[:-1]
        sizes = shape if len(shape) == len(axes) else shape[1:]
        values = np.asarray(result.values).reshape(len(names), *sizes, -1)
        sites = list(itertools.product(range(len(names)), *map(range, sizes)))[::5]
        for layer, *entries in sites:
            patch = Replace(clean[names[layer]], **dict(zip(axes, entries, strict=True)))
            want = METRIC(model.run_with_hooks(CORRUPTED, fwd_hooks=[(names[layer], patch)]))
            np.testing.assert_allclose(values[(layer, *entries)], want, rtol=1e-5, atol=1e-5, err_msg=what)


def test_ablating_features_and_estimating_it() -> None:
    model = spliced()
    name = "blocks.2.hook_resid_pre.hook_sae_acts_post"
    exact = ablation_sweep(model, CLEAN, METRIC, name, ("pos", "feature"), progress=False)
    estimate = sweep(model, CLEAN, Zero(), METRIC, name, ("pos", "feature"), method="attribution", progress=False)
    _, cache, grads = model.run_with_grads(CLEAN, METRIC, name)
    by_hand = -(np.asarray(cache[name]) * np.asarray(grads[name])).mean(axis=0)
    np.testing.assert_allclose(np.squeeze(estimate.effect()), by_hand, rtol=1e-4, atol=1e-5)
    integrated = sweep(
        model, CLEAN, Zero(), METRIC, name, ("pos", "feature"), method="ig", along="activation", steps=8, progress=False
    )
    error, linear = (np.abs(one.effect() - exact.effect()).max() for one in (integrated, estimate))
    assert error < linear or linear < 1e-3


def test_layers_with_other_widths_are_refused() -> None:
    model = spliced().without_dictionaries()
    model = model.with_dictionaries(
        {"blocks.1.hook_resid_pre": dictionary(), "blocks.2.hook_resid_pre": dictionary(d_sae=5)}
    )
    with pytest.raises(InputError, match="sweep layers that are alike"):
        sweep(model, CORRUPTED, CLEAN, METRIC, "hook_resid_pre.hook_sae_acts_post", ("feature",))


def test_equal_dictionaries_share_programs_and_new_values_compile_nothing(compilations: Any) -> None:
    tokens = CLEAN[:1, :4]
    plain = spliced().without_dictionaries()
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]

    def programs(model: Any) -> int:
        before = _apply_compiled._cache_size()
        jax.block_until_ready(model(tokens))
        return _apply_compiled._cache_size() - before

    assert programs(plain) == 3
    assert programs(plain.with_dictionaries({names[1]: dictionary()})) == 1
    assert programs(plain.with_dictionaries({name: dictionary(seed=n) for n, name in enumerate(names)})) == 0
    start = compilations.count
    plain.with_dictionaries({name: dictionary(seed=n + 5) for n, name in enumerate(names)})(tokens)
    assert compilations.count == start
