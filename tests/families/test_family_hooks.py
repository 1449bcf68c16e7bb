"""What the activations of every family obey, and that a change at every hook point takes effect."""

import jax
import numpy as np
import pytest
from family_case import (
    FEW_VARIANTS,
    ONLY_SLOWER,
    TOKENS,
    Edit,
    FamilyCase,
    is_divisor,
    is_split_input,
    largest,
)
from hf_models import VARIANTS, hf_config

from tljax import HookPoint
from tljax.checkpoints.families import family_of
from tljax.errors import InputError
from tljax.hooks.points import layer_of, point_table, stage_of
from tljax.modules.activations import soft_cap

SAME, CHANGED, TOLERANCE = 2e-5, 1e-4, 5e-5


def test_patterns_weigh_values(case: FamilyCase) -> None:
    _, cache = case.run
    cfg = case.raw.cfg
    for layer in range(cfg.n_layers):
        v = np.asarray(cache["v", layer])
        v = v if cfg.clip_qkv is None else np.clip(v, -cfg.clip_qkv, cfg.clip_qkv)
        values = np.repeat(v, cfg.n_heads // v.shape[2], axis=2)
        z = np.einsum("bhqk,bkhd->bqhd", cache["pattern", layer], values)
        np.testing.assert_allclose(z, cache["z", layer], atol=1e-5, err_msg=f"layer {layer}")


def test_what_is_written_sums_to_the_residual_stream(case: FamilyCase) -> None:
    _, cache = case.run
    stream = np.asarray(cache["hook_embed"]) + np.asarray(cache.get("hook_pos_embed", 0.0))
    for layer in range(case.raw.cfg.n_layers):
        np.testing.assert_allclose(cache["resid_pre", layer], stream, atol=1e-5, rtol=1e-5)
        middle = stream + np.asarray(cache["attn_out", layer])
        if case.raw.cfg.use_normalization_of_residual:
            middle = normalised(case, layer, "ln1", middle)
        if f"blocks.{layer}.hook_resid_mid" in cache:
            np.testing.assert_allclose(cache["resid_mid", layer], middle, atol=1e-5, rtol=1e-5)
        stream = middle + np.asarray(cache.get(f"blocks.{layer}.hook_mlp_out", 0.0))
        if case.raw.cfg.use_normalization_of_residual:
            stream = normalised(case, layer, "ln2", stream)
        np.testing.assert_allclose(cache["resid_post", layer], stream, atol=1e-5, rtol=1e-5)


def normalised(case: FamilyCase, layer: int, norm: str, stream: np.ndarray) -> np.ndarray:
    """A layer norm of the residual stream, of the exact input rather than of what the cache says of it."""
    parameters = jax.tree.map(np.asarray, case.raw.params["blocks"][layer][norm])
    centred = stream - stream.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + case.raw.cfg.eps)
    return centred / scale * parameters["w"] + parameters["b"]


@pytest.mark.one_variant_a_family
def test_logit_attributions_of_all_parts_sum_to_the_logit(case: FamilyCase) -> None:
    logits, cache = case.run
    answer = 7
    if case.raw.cfg.use_normalization_of_residual:
        with pytest.raises(InputError, match="normalises the stream itself"):
            cache.get_full_resid_decomposition(expand_neurons=False)
        return
    parts = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=-1)
    np.testing.assert_allclose(parts.sum(axis=0), cache["resid_post", -1][:, -1], atol=2e-5, rtol=1e-5)
    found = cache.logit_attrs(parts, answer, pos_slice=-1).sum(axis=0) + cache.logit_bias(answer)
    cap = case.raw.cfg.output_logits_soft_cap
    found = soft_cap(found, cap) if cap > 0 else found
    np.testing.assert_allclose(found, np.asarray(logits)[:, -1, answer], atol=5e-5, rtol=1e-5)


def test_a_run_in_two_parts_is_the_whole(case: FamilyCase) -> None:
    logits, cache = case.run
    for layer in (1, 2):
        residual, before = case.raw.run_with_cache(TOKENS, stop_at_layer=layer)
        rest, after = case.raw.run_with_cache(residual, start_at_layer=layer)
        np.testing.assert_array_equal(rest, logits)
        assert list(before) + list(after) == list(cache)


def changes(values: dict[str, np.ndarray], rows: int, base: int) -> np.ndarray:
    """Largest difference of each of the first rows to row ``base`` ``[rows, points]``, in the points' order."""
    return np.array([[largest(value[row], value[base]) for value in values.values()] for row in range(rows)])


def test_zeroing_any_point_changes_what_follows_and_nothing_before(case: FamilyCase) -> None:
    """One run: row ``n`` has a zero at point ``n``; what divides something is doubled at every other position."""
    logits, cache = case.hooked
    points, base = case.points, len(case.points)
    assert list(cache) == points
    difference = changes(cache, len(points), base)
    for row, name in enumerate(points):
        before = {points[n]: change for n, change in enumerate(difference[row, :row]) if not change <= SAME}
        assert not before, f"{name} changed {before}, which fires earlier"
        expected = np.zeros_like(cache[name][base])
        if is_divisor(name):
            expected = cache[name][base].copy()
            expected[::2] *= 2
        np.testing.assert_allclose(cache[name][row], expected, rtol=1e-4, atol=1e-5, err_msg=name)
        if not np.array_equal(cache[name][base], expected):
            assert np.isfinite(logits[row]).all(), name
            assert largest(logits[row], logits[base]) > CHANGED, f"{name} changed nothing"
    case.figures["points"] = len(points)


@pytest.mark.few_variants
def test_python_functions_at_every_point(case: FamilyCase) -> None:
    """The same zeros by a plain function at every point of a layer of each kind, which sees concrete arrays."""
    cfg = case.raw.cfg
    layers = {kind: layer for layer, kind in enumerate(cfg.layer_kinds)}.values()
    row_of = {name: row for row, name in enumerate(case.points) if layer_of(name) in (None, *layers)}

    def change_own_row(activation: jax.Array, hook: HookPoint) -> jax.Array:
        assert not isinstance(activation, jax.core.Tracer)
        row = row_of[hook.name]
        return activation.at[row, ::2].multiply(2) if is_divisor(hook.name) else activation.at[row].set(0)

    model = case.raw.with_hooks([(list(row_of), change_own_row)])
    with jax.disable_jit():  # each change would be another program
        tokens = jax.numpy.asarray(case.rows())
        logits, cache = model.run_with_cache(tokens, attention_mask=case.mask(), names_filter=case.points)
    expected, known = case.hooked
    rows = list(row_of.values())
    assert largest(np.asarray(logits)[rows], expected[rows]) < CHANGED
    for name, value in known.items():
        largest_value = np.abs(value[rows][np.isfinite(value[rows])]).max(initial=1)
        assert largest(np.asarray(cache[name])[rows], value[rows]) < SAME * largest_value, name


def test_every_point_has_a_variant_for_plain_functions() -> None:
    covered = set().union(*(point_names(variant) for variant in FEW_VARIANTS))
    new = {name: variant for variant in VARIANTS for name in point_names(variant) - covered}
    left = {name: variant for name, variant in new.items() if not any(part in name for part in ONLY_SLOWER)}
    assert not left, f"variants of these must join FEW_VARIANTS in family_case.py: {left}"


def point_names(variant: str) -> set[str]:
    """The points of a variant without their layers, but for those that make heads read apart."""
    attributes = hf_config(variant).to_dict()
    family = family_of(attributes)
    cfg = family.read_config(family.config(attributes))
    return {stage_of(name)[1] for name in point_table(cfg) if not is_split_input(name)}


@pytest.mark.one_variant_a_family
def test_zeroing_what_queries_keys_and_values_read(case: FamilyCase) -> None:
    """The optional points where heads read apart: each changes its own reader and the logits, and no other reader."""
    names = case.split_points
    readers = [f"blocks.{layer}.attn.hook_{letter}" for layer in range(case.raw.cfg.n_layers) for letter in "qkv"]
    model = case.switched(names, [Edit(name) for name in names])
    logits, cache = model.run_with_cache(case.rows(), attention_mask=case.mask(), names_filter=[*names, *readers])
    logits, base = np.asarray(logits), len(case.points)
    plain, known = case.hooked
    assert largest(logits[base], plain[base]) < TOLERANCE
    for row, name in enumerate(names):
        assert not np.asarray(cache[name])[row].any()
        assert largest(logits[row], logits[base]) > CHANGED, f"{name} changed nothing"
        block, point = name.rsplit(".", 1)
        letters = {"hook_attn_in": "qkv"}.get(point, point.removeprefix("hook_")[0])
        for reader in readers:
            change = largest(np.asarray(cache[reader])[row], known[reader][base])
            if reader < block or (reader.startswith(block) and reader[-1] not in letters):
                assert change <= SAME, f"{name} changed {reader}"
            elif reader.startswith(block):
                assert change > CHANGED, f"{name} did not change {reader}"
    case.figures["split_points"] = len(names)
