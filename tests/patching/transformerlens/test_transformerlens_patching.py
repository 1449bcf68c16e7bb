"""TransformerLens's patching functions: against the loop they stand for, and against TransformerLens 3.9 itself.

``tests/golden/make_patching.py`` made the golden file and says what is in it.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from tljax import HookedTransformer, Replace
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.patching import LogitDiff, PatchingResult
from tljax.patching import transformerlens as patching

GOLDEN = Path(__file__).parents[2] / "golden"
L, P, H = 2, 7, 4
ANSWER, WRONG = 3, 11

FUNCTIONS: dict[str, tuple[str, Callable[..., Any], tuple[str, ...]]] = {
    "resid_pre": ("hook_resid_pre", patching.layer_pos_patch_setter, ("pos",)),
    "resid_mid": ("hook_resid_mid", patching.layer_pos_patch_setter, ("pos",)),
    "attn_out": ("hook_attn_out", patching.layer_pos_patch_setter, ("pos",)),
    "mlp_out": ("hook_mlp_out", patching.layer_pos_patch_setter, ("pos",)),
    "attn_head_out_by_pos": ("attn.hook_z", patching.layer_pos_head_vector_patch_setter, ("pos", "head")),
    "attn_head_q_by_pos": ("attn.hook_q", patching.layer_pos_head_vector_patch_setter, ("pos", "head")),
    "attn_head_k_by_pos": ("attn.hook_k", patching.layer_pos_head_vector_patch_setter, ("pos", "head")),
    "attn_head_v_by_pos": ("attn.hook_v", patching.layer_pos_head_vector_patch_setter, ("pos", "head")),
    "attn_head_out_all_pos": ("attn.hook_z", patching.layer_head_vector_patch_setter, ("head",)),
    "attn_head_q_all_pos": ("attn.hook_q", patching.layer_head_vector_patch_setter, ("head",)),
    "attn_head_k_all_pos": ("attn.hook_k", patching.layer_head_vector_patch_setter, ("head",)),
    "attn_head_v_all_pos": ("attn.hook_v", patching.layer_head_vector_patch_setter, ("head",)),
    "attn_head_pattern_all_pos": ("attn.hook_pattern", patching.layer_head_pattern_patch_setter, ("head",)),
    "attn_head_pattern_by_pos": (
        "attn.hook_pattern", patching.layer_head_pos_pattern_patch_setter, ("head", "query_pos"),
    ),
    "attn_head_pattern_dest_src_pos": (
        "attn.hook_pattern", patching.layer_head_dest_src_pos_pattern_patch_setter, ("head", "query_pos", "key_pos"),
    ),
}  # fmt: skip


def metric(logits: jax.Array) -> jax.Array:
    """One number for all prompts."""
    return (logits[:, -1, ANSWER] - logits[:, -1, WRONG]).mean()


def per_prompt(logits: jax.Array) -> jax.Array:
    """One number for each prompt."""
    return logits[:, -1, ANSWER] - logits[:, -1, WRONG]


def function(name: str) -> Callable[..., Any]:
    return getattr(patching, f"get_act_patch_{name}")


class Case:
    """A golden model, its prompts, and what TransformerLens gave."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / "patching_transformerlens.safetensors", framework="numpy") as file:
            self.record = json.loads(file.metadata()["record"])
            keys = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118
            self.expected = {key.split("/get_act_patch_")[1]: file.get_tensor(key) for key in keys}
            self.corrupted = jnp.asarray(file.get_tensor(f"{name}:corrupted"))
        self.model, self.clean = golden_model(name)
        self.cache = self.model.run_with_cache(self.clean)[1]

    @property
    def inputs(self) -> tuple[HookedTransformer, jax.Array, Any]:
        return self.model, self.corrupted, self.cache

    def loop(self, setter: Callable[..., Any], point: str, index: Sequence[Any]) -> float:
        """One site by ``run_with_hooks`` and the setter itself."""
        name = f"blocks.{index[0]}.{point}"
        hook = (name, lambda activation, hook: jnp.asarray(setter(activation, index, self.cache[name])))
        with jax.disable_jit():  # compiling every kind of hooked block takes longer than running them
            return float(metric(self.model.run_with_hooks(self.corrupted, fwd_hooks=[hook])))


def golden_model(case: str) -> tuple[HookedTransformer, jax.Array]:
    """The model and the clean tokens of a golden file."""
    with safe_open(GOLDEN / f"transformerlens_{case}.safetensors", framework="numpy") as file:
        record = json.loads(file.metadata()["record"])
        cfg = HookedTransformerConfig.from_dict(record["config"])

        def tensor(key: str) -> np.ndarray:
            return file.get_tensor(record["aliases"].get(key, key))

        tree: dict[str, Any] = {"blocks": tuple({} for _ in range(cfg.n_layers))}
        for name in record["params"]:
            *path, leaf = name.split(".")
            value, node = tensor(f"params/{name}"), tree
            for part in path:
                node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
            leaf = leaf.lstrip("_")
            node[leaf] = jnp.asarray(np.swapaxes(value, 0, 1) if leaf in ("W_Q", "W_K", "W_V") else value)
        return HookedTransformer(cfg, params=tree), jnp.asarray(tensor("tokens").astype(np.int32))


@pytest.fixture(scope="module")
def cases() -> Callable[[str], Case]:
    return functools.cache(Case)


@pytest.fixture(scope="module")
def llama(cases: Callable[[str], Case]) -> Case:
    """Four heads, two of keys and values."""
    return cases("llama")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_each_function_agrees(cases: Callable[[str], Case], family: str, name: str) -> None:
    """With TransformerLens at every site, and with the loop at one or two."""
    case = cases(family)
    if name not in case.expected:
        assert (family, name) == ("neox", "resid_mid")  # parallel blocks have none
        return
    if family != "llama" and name.endswith("_all_pos"):
        return  # programs that "by_pos" has shown already; compiling them takes time
    got = function(name)(*case.inputs, metric)
    assert isinstance(got, jax.Array)
    assert got.shape == case.expected[name].shape
    np.testing.assert_allclose(got, case.expected[name], atol=1e-4)
    point, setter, axes = FUNCTIONS[name]
    heads = case.model.cfg.kv_heads if point in ("attn.hook_k", "attn.hook_v") else H
    for layer, head, at in ((0, heads - 1, 3), (1, 0, 6))[: 2 if family == "llama" else 1]:
        index = [layer, *({"head": head, "key_pos": at - 1}.get(axis, at) for axis in axes)]
        assert float(got[tuple(index)]) == pytest.approx(case.loop(setter, point, index), abs=1e-5)


@pytest.mark.parametrize("name", ["attn_head_all_pos_every", "attn_head_by_pos_every", "block_every"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_every_agrees(cases: Callable[[str], Case], family: str, name: str) -> None:
    """With TransformerLens, zeros in place of missing key and value heads included."""
    case = cases(family)
    if family != "llama" and name == "attn_head_all_pos_every":
        return
    got = function(name)(*case.inputs, metric)
    assert got.shape == case.expected[name].shape
    np.testing.assert_allclose(got, case.expected[name], atol=1e-4)


def test_every_function_of_transformerlens_is_there(llama: Case) -> None:
    every = {"attn_head_all_pos_every", "attn_head_by_pos_every", "block_every"}
    assert set(llama.expected) == {*FUNCTIONS, *every}
    for name in llama.expected:
        assert function(name).__name__ == f"get_act_patch_{name}"
        assert function(name).__doc__


def test_columns_of_the_index_have_transformerlens_names(llama: Case) -> None:
    for name in ("resid_pre", "attn_head_k_by_pos", "attn_head_pattern_by_pos"):
        columns = llama.record["columns"][f"get_act_patch_{name}"]
        values, index = function(name)(*llama.inputs, metric, return_index_df=True)
        pd.testing.assert_frame_equal(index, patching.make_df_from_ranges(values.shape, columns))


# --- setters of a user's own


def add_noise(corrupted_act: jax.Array, index: Sequence[int], clean_act: jax.Array) -> jax.Array:
    layer, pos = index
    noise = np.random.default_rng(10 * layer + pos).normal(size=corrupted_act.shape[2:]).astype(np.float32)
    return corrupted_act.at[:, pos].add(noise)


def two_positions(corrupted_act: jax.Array, index: Sequence[int], clean_act: jax.Array) -> jax.Array:
    _, a, b = index
    return corrupted_act.at[:, jnp.asarray([a, b])].set(clean_act[:, jnp.asarray([a, b])])


def swap_heads(corrupted_act: jax.Array, index: Sequence[int], clean_act: jax.Array) -> jax.Array:
    _, a, b = index
    return corrupted_act.at[:, :, a].set(clean_act[:, :, b]).at[:, :, b].set(clean_act[:, :, a])


def blur(corrupted_act: jax.Array, index: Sequence[int], clean_act: jax.Array) -> np.ndarray:
    _, head = index
    changed = np.array(corrupted_act)
    changed[:, head] = 0.5 * changed[:, head] + 0.5 * np.asarray(clean_act[:, head])
    return changed


@pytest.mark.parametrize(
    ("family", "setter", "activation", "point", "names"),
    [
        ("llama", add_noise, "resid_pre", "hook_resid_pre", ("layer", "pos")),
        ("llama", add_noise, "mlp_out", "hook_mlp_out", ("layer", "pos")),
        ("neox", add_noise, "mlp_out", "hook_mlp_out", ("layer", "pos")),
        ("llama", two_positions, "resid_post", "hook_resid_post", ("layer", "dest_pos", "src_pos")),
        ("llama", swap_heads, "z", "attn.hook_z", ("layer", "head_index", "head")),
        ("llama", blur, "pattern", "attn.hook_pattern", ("layer", "head")),
    ],
)  # fmt: skip
def test_a_users_setter_equals_the_loop(
    cases: Callable[[str], Case],
    family: str,
    setter: Callable[..., Any],
    activation: str,
    point: str,
    names: tuple[str, ...],
) -> None:
    case, shape = cases(family), tuple({"layer": L, "head": H, "head_index": H}.get(name, P) for name in names)
    got = patching.generic_activation_patch(
        *case.inputs, metric, setter, activation, index_axis_names=names, baseline=True
    )
    assert got.shape == shape
    assert got.axis_names == (("layer", "query_pos", "key_pos") if "dest_pos" in names else names)
    assert got.report.sites == got.values.size
    for index in (tuple(n - 1 for n in shape), (0, *range(2, len(shape) + 1))):
        assert float(got[index]) == pytest.approx(case.loop(setter, point, index), abs=1e-5)


def test_a_known_setter_and_the_same_as_ones_own_agree(llama: Case) -> None:
    """Every site, computed from what the setter says and from what it returns."""
    _, setter, _ = FUNCTIONS["attn_head_v_by_pos"]
    own = patching.get_act_patch_attn_head_v_by_pos(*llama.inputs, metric, patch_setter=lambda *args: setter(*args))
    np.testing.assert_allclose(own, patching.get_act_patch_attn_head_v_by_pos(*llama.inputs, metric), atol=1e-5)


def test_values_that_do_not_fit_in_memory_come_in_groups(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*llama.inputs, metric, add_noise, "resid_pre")
    index = pd.DataFrame({"layer": [1, 0, 1, 1, 0, 1, 1], "pos": [4, 2, 0, 1, 4, 3, 2]})
    whole = patching.generic_activation_patch(*arguments, index_df=index, baseline=True)
    monkeypatch.setattr("tljax.memory.WORKING_BYTES", 5 * 2 * 8 * 12 * 4)  # five sites: two prompts padded to eight
    parts = patching.generic_activation_patch(*arguments, index_df=index, baseline=True)
    np.testing.assert_allclose(parts.values, whole.values, atol=1e-6)
    assert (parts.report.sites, parts.report.naive_flops) == (7, pytest.approx(whole.report.naive_flops))
    assert float(whole[3]) == pytest.approx(llama.loop(add_noise, "hook_resid_pre", (1, 1)), abs=1e-5)


def test_an_index_may_hold_anything_besides_layers(llama: Case) -> None:
    """A steering sweep: scales in a column, a direction of the setter's own, no clean run."""
    direction = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)

    def steer(corrupted_act: jax.Array, index: Sequence[Any], clean_act: jax.Array) -> jax.Array:
        _, scale = index
        return corrupted_act + jnp.reshape(scale * direction, (1, 1, -1))

    index = pd.DataFrame({"layer": [0, 1, 1], "scale": [0.5, 2.0, 0.0]})
    prompts = (llama.corrupted, llama.corrupted)
    got = patching.generic_activation_patch(llama.model, *prompts, metric, steer, "resid_pre", index_df=index)
    for row, (layer, scale) in enumerate(index.itertuples(index=False)):
        expected = llama.loop(steer, "hook_resid_pre", (int(layer), float(scale)))
        assert float(got[row]) == pytest.approx(expected, abs=1e-5)


def test_a_setter_may_read_a_clean_run_of_another_length(llama: Case) -> None:
    model, corrupted, _ = llama.inputs
    _, longer = model.run_with_cache(jnp.concatenate([llama.clean, llama.clean[:, :3]], axis=1))

    def last(corrupted_act: jax.Array, index: Sequence[int], clean_act: jax.Array) -> jax.Array:
        assert clean_act.shape == (2, P + 3, 12)
        return corrupted_act.at[:, index[1]].set(clean_act[:, -1])

    got = patching.generic_activation_patch(model, corrupted, longer, metric, last, "resid_pre", ("layer", "pos"))
    hook = Replace(longer["resid_pre", 1][:, -1:], pos=[3])
    expected = metric(model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.hook_resid_pre", hook)]))
    assert float(got[1, 3]) == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(InputError, match="must have equally many tokens"):
        patching.get_act_patch_resid_pre(model, corrupted, longer, metric)


# --- indices


def test_a_listed_index_picks_sites(llama: Case) -> None:
    grid = function("attn_head_out_by_pos")(*llama.inputs, metric)
    index = pd.DataFrame({"head_index": [3, 0, 0], "layer": [1, 0, -1], "pos": [4, 2, -1]})
    flat, table = function("attn_head_out_by_pos")(*llama.inputs, metric, index_df=index, return_index_df=True)
    assert table is index
    np.testing.assert_allclose(flat, [grid[1, 4, 3], grid[0, 2, 0], grid[1, 6, 0]], atol=1e-5)
    by_place = pd.DataFrame({"layer": [1], "where": [4], "which": [3]})
    got = function("attn_head_out_by_pos")(*llama.inputs, metric, index_df=by_place, baseline=True)
    assert (got.axis_names, got.rows is by_place) == (("row",), True)
    np.testing.assert_allclose(got.values, [grid[1, 4, 3]], atol=1e-5)


def test_axes_come_in_any_order_under_either_name(llama: Case) -> None:
    grid = function("attn_head_pattern_by_pos")(*llama.inputs, metric, baseline=True)
    assert grid.axis_names == ("layer", "head", "query_pos")
    names = ("query_pos", "layer", "head")
    turned = function("attn_head_pattern_by_pos")(*llama.inputs, metric, index_axis_names=names)
    np.testing.assert_allclose(turned, jnp.moveaxis(grid.values, 2, 0), atol=1e-6)


def test_a_point_that_exists_once_has_no_layer(llama: Case) -> None:
    setter = patching.layer_pos_patch_setter
    embed = patching.generic_activation_patch(*llama.inputs, metric, setter, "embed", ("pos",))
    whole = patching.get_act_patch_resid_pre(*llama.inputs, metric)
    np.testing.assert_allclose(embed, whole[0], atol=1e-5)  # the embedding is what enters the first block
    whole = patching.get_act_patch_mlp_out(*llama.inputs, metric)
    one = patching.generic_activation_patch(*llama.inputs, metric, setter, "blocks.1.hook_mlp_out", ("pos",))
    np.testing.assert_allclose(one, whole[1], atol=1e-6)


# --- metrics, reductions, results


def test_when_a_result_is_an_array(llama: Case) -> None:
    """Plain for one metric with scalar or mean; otherwise a PatchingResult, which always has a baseline."""
    arguments = llama.inputs
    plain = patching.get_act_patch_resid_pre(*arguments, metric)
    np.testing.assert_allclose(
        patching.get_act_patch_resid_pre(*arguments, per_prompt, reduce="mean"), plain, atol=1e-6
    )
    kept = patching.get_act_patch_resid_pre(*arguments, per_prompt, reduce="none")
    assert isinstance(kept, PatchingResult)
    assert (kept.axis_names, kept.shape, kept.reduced) == (("layer", "pos", "batch"), (L, P, 2), False)
    np.testing.assert_allclose(kept.mean(), plain, atol=1e-6)
    np.testing.assert_allclose(kept.baseline, per_prompt(llama.model(llama.corrupted)), atol=1e-5)
    compared = patching.get_act_patch_resid_pre(*arguments, metric, baseline=True)
    assert isinstance(compared, PatchingResult)
    np.testing.assert_allclose(compared.effect(), plain - metric(llama.model(llama.corrupted)), atol=1e-5)
    several = patching.get_act_patch_resid_pre(*arguments, {"diff": metric, "one": lambda logits: logits[0, -1, 0]})
    assert (several.axis_names, several.metric_names) == (("metric", "layer", "pos"), ("diff", "one"))
    np.testing.assert_allclose(several["diff"].values, plain, atol=1e-6)
    both = patching.get_act_patch_resid_pre(*arguments, {"diff": LogitDiff(ANSWER, WRONG)}, reduce="none")
    np.testing.assert_allclose(both.values[0], kept.values, atol=1e-6)


def test_a_metric_may_give_plain_numbers(llama: Case) -> None:
    expected = patching.get_act_patch_resid_pre(*llama.inputs, metric)
    got = patching.get_act_patch_resid_pre(*llama.inputs, lambda logits: float(metric(logits)))
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("attn_head_all_pos_every", ("out", "q", "k", "v", "pattern")),
        ("attn_head_by_pos_every", ("out", "q", "k", "v", "pattern")),
        ("block_every", ("resid_pre", "attn_out", "mlp_out")),
    ],
)
def test_kinds_side_by_side(llama: Case, name: str, parts: tuple[str, ...]) -> None:
    """Several metrics, prompts kept apart: NaN where there is no key or value head, instead of zero."""
    plain = llama.expected[name]
    metrics = {"diff": per_prompt, "one": lambda logits: logits[:, -1, 0]}
    result = function(name)(*llama.inputs, metrics, reduce="none")
    assert result.shape == (2, *plain.shape, 2)
    assert (result.axis_names[:3], result.axis_names[-1]) == (("metric", "patch_type", "layer"), "batch")
    assert (result.patch_type_names, result.metric_names) == (parts, ("diff", "one"))
    missing = np.zeros(plain.shape, bool)
    if name != "block_every":
        missing[2:4, ..., llama.model.cfg.kv_heads :] = True
    assert (np.isnan(result.values) == missing[None, ..., None]).all()
    np.testing.assert_allclose(np.where(missing, 0, result["diff"].mean()), plain, atol=1e-4)
    assert result.report.sites == (~missing).sum()
    assert len(result["diff"].top(3)) == 3
    assert len(result.to_dataframe()) == result.values.size


def test_every_takes_a_listed_index(llama: Case) -> None:
    grid = patching.get_act_patch_attn_head_by_pos_every(*llama.inputs, metric)
    index = patching.make_df_from_ranges((2, 1, 2), ("layer", "pos", "head")).assign(pos=3)
    flat = patching.get_act_patch_attn_head_by_pos_every(*llama.inputs, metric, index_df=index)
    np.testing.assert_allclose(flat, grid[:, :, 3, :2].reshape(5, 4), atol=1e-6)


def test_tokens_label_the_axes(tiny: HookedTransformer) -> None:
    clean = "Then, John and Mary went to the store. John gave a drink to"
    corrupted = clean.replace("John gave", "Mary gave")
    answers = LogitDiff(tiny.to_single_token(" Mary"), tiny.to_single_token(" John"))
    _, cache = tiny.run_with_cache(clean)
    result = patching.get_act_patch_resid_pre(tiny, corrupted, cache, answers, baseline=True)
    assert result.labels["pos"] == tuple(map(str, tiny.to_str_tokens(corrupted)))
    assert result.labels["layer"] == ("L0", "L1", "L2", "L3")
    np.testing.assert_allclose(result[0, -1], result.baseline, atol=1e-4)  # the last token is the same in both


# --- mistakes


def in_place(corrupted_act: Any, index: Sequence[int], clean_act: Any) -> Any:
    corrupted_act[:, index[1]] = clean_act[:, index[1]]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"index_axis_names": ("layer", "pos"), "index_df": 1}, "either index_axis_names"),
    ({}, "either index_axis_names"),
    ({"index_axis_names": ("layer", "position")}, r"has 'position'; axes are .*Did you mean 'pos'"),
    ({"index_axis_names": ("layer", "layer")}, "each once"),
    ({"index_axis_names": ()}, "at least one"),
    ({"index_axis_names": "layer"}, r"\('layer',\) instead of 'layer'"),
    ({"index_axis_names": ("pos",)}, "no layer, and every layer has 'resid_pre'"),
    ({"index_axis_names": ("layer", "head")}, r"layer_pos_patch_setter takes an index of \('layer', 'pos'\)"),
    ({"index_axis_names": ("layer",)}, r"takes an index of \('layer', 'pos'\); this one has \('layer',\)"),
    ({"index_axis_names": ("layer", "pos"), "activation_name": "pattern"}, "blocks.0.attn.hook_pattern has .*Choose"),
    ({"index_axis_names": ("layer", "pos"), "activation_name": "blocks.1.hook_mlp_out"}, "exists once"),
    ({"index_axis_names": ("layer", "pos"), "activation_name": "embed"}, "exists once"),
    ({"index_axis_names": ("layer", "pos"), "patch_setter": in_place}, r"cannot change in place: return .*\.at\["),
    ({"index_axis_names": ("layer", "pos"), "patch_setter": lambda *_: None}, "returned None .*cannot change in"),
    ({"index_axis_names": ("layer", "pos"), "patch_setter": lambda act, i, _: act[:, i[1]]}, r"\(2, 12\) for index"),
    ({"index_axis_names": ("layer", "pos"), "patch_setter": lambda *_: 3.0}, "returned a float"),
    ({"index_df": [[0, 1]]}, "index_df is a pandas DataFrame .* got list"),
    ({"index_df": pd.DataFrame({"pos": [1]})}, "no layer"),
    ({"index_df": pd.DataFrame({"layer": [], "pos": []})}, "no rows"),
    ({"index_df": pd.DataFrame({"layer": [0, 2], "pos": [1, 1]})}, "layer 2 in row 1; the model has 0 to 1"),
    ({"index_df": pd.DataFrame({"layer": [0], "pos": [7]})}, "pos 7 in row 0; .* has 0 to 6"),
    ({"index_df": pd.DataFrame({"layer": [0], "pos": [0.5]})}, "pos 0.5 in row 0"),
    ({"index_df": pd.DataFrame({"layer": [0], "head": [1]})}, r"takes an index of \('layer', 'pos'\)"),
    ({"index_axis_names": ("layer", "pos"), "reduce": "mean"}, "'metric' returns one for all"),
    ({"index_axis_names": ("layer", "pos"), "reduce": "none"}, "'metric' returns one for all"),
    ({"index_axis_names": ("layer", "pos"), "patching_metric": per_prompt}, 'pass reduce="mean"'),
    ({"index_axis_names": ("layer", "pos"), "patching_metric": {"a": metric, "b": per_prompt}}, "'b' returns a number"),
    ({"index_axis_names": ("layer", "pos"), "patching_metric": {}}, "mapping of metrics is empty"),
    ({"index_axis_names": ("layer", "pos"), "patching_metric": lambda logits: logits[:, -1]}, r"of shape \(2, 50\)"),
    ({"index_axis_names": ("layer", "pos"), "baseline": True, "return_index_df": True}, "PatchingResult has its"),
    ({"index_axis_names": ("layer", "pos"), "corrupted_tokens": np.zeros((2, 4), int)}, "must have equally many"),
    ({"index_axis_names": ("layer", "pos"), "clean_cache": {}}, "clean cache does not hold blocks.0.hook_resid_pre"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "match"), MISTAKES)
def test_mistakes(llama: Case, changes: dict[str, Any], match: str) -> None:
    arguments = {
        "corrupted_tokens": llama.corrupted, "clean_cache": llama.cache, "patching_metric": metric,
        "patch_setter": patching.layer_pos_patch_setter, "activation_name": "resid_pre",
    }  # fmt: skip
    with pytest.raises(InputError, match=match):
        patching.generic_activation_patch(llama.model, **{**arguments, **changes})


def test_more_mistakes(llama: Case) -> None:
    with pytest.raises(InputError, match="for several pass baseline=True"):
        patching.get_act_patch_block_every(*llama.inputs, metric, return_index_df=True)
    with pytest.raises(InputError, match="2 ranges for 1 columns"):
        patching.make_df_from_ranges((2, 3), ("layer",))

    def broken(corrupted_act: Any, index: Any, clean_act: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        patching.generic_activation_patch(*llama.inputs, metric, broken, "z", ("layer", "head"))
    assert caught.value.__notes__ == ["(raised in the patch_setter at blocks.0.attn.hook_z, index [0, 0])"]


def test_a_second_sweep_compiles_nothing(llama: Case, compilations: Any) -> None:
    for _ in range(2):
        start = compilations.count
        patching.get_act_patch_block_every(*llama.inputs, metric)
        patching.generic_activation_patch(
            *llama.inputs, metric, lambda *args: add_noise(*args), "resid_pre", ("layer", "pos")
        )
    assert compilations.count == start
