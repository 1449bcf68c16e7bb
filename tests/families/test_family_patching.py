"""Small activation-patching sweeps against one full run for each site."""

import itertools

import numpy as np
import pytest
from family_case import LENGTH, PROMPT, Edit, FamilyCase

from tljax.patching import LogitDiff, sweep

LAYERS = (0, 2)
CHANGED = LENGTH - 4  # near enough to the end for windows to reach it
SITES = {"resid_pre": ("pos", (CHANGED, LENGTH - 1)), "z": ("head", (0, 1))}
CORRUPTED = np.where(np.arange(LENGTH) == CHANGED, (PROMPT + 1) % 40, PROMPT)[None]
METRIC = LogitDiff(1, 2)


@pytest.mark.parametrize(
    "activation",
    [
        pytest.param("resid_pre", marks=pytest.mark.one_variant_a_family),
        pytest.param("z", marks=pytest.mark.few_variants),
    ],
)
def test_a_sweep_equals_the_loop(case: FamilyCase, activation: str) -> None:
    axis, entries = SITES[activation]
    point = f"hook_{activation}" if activation == "resid_pre" else f"attn.hook_{activation}"
    names = {layer: f"blocks.{layer}.{point}" for layer in LAYERS}
    _, cache = case.hooked
    clean = {name: cache[name][len(case.points)][None] for name in names.values()}
    got = sweep(case.raw, CORRUPTED, clean, METRIC, activation, (axis,), layers=LAYERS, at={axis: list(entries)})
    sites = list(itertools.product(LAYERS, entries))
    where = np.arange(LENGTH)[:, None] if axis == "pos" else np.arange(case.raw.cfg.n_heads)[:, None]
    edits = [Edit(names[layer], clean[names[layer]][0], where == entry) for layer, entry in sites]
    tokens = np.tile(CORRUPTED, (case.n_rows, 1))
    mask = np.ones(tokens.shape, bool)
    mask[-1, -1] = False  # an unused row: all of a mask that masks nothing would be another program
    logits, _ = case.switched(case.points, edits).run_with_cache(tokens, attention_mask=mask, names_filter=case.points)
    effects = np.asarray(METRIC(logits))
    np.testing.assert_allclose(np.asarray(got.values).reshape(-1), effects[: len(sites)], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(got.baseline, effects[len(sites)], atol=1e-5, rtol=1e-5)
    assert np.abs(effects[: len(sites)] - effects[len(sites)]).max() > 1e-4
