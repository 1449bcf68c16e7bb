"""Patching results: named axes, and statistics against their definitions and scipy's."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tljax.errors import InputError
from tljax.patching import statistics
from tljax.patching.result import PatchingResult

RNG = np.random.default_rng(7)
TOKENS = ("<s>", " John", "$5")


def array(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def kept() -> PatchingResult:
    """Five prompts kept apart, two layers, three positions."""
    baseline = array(5)
    labels = {"pos": TOKENS, "head": ("of", "no", "axis")}
    return PatchingResult(
        array(2, 3, 5), ("layer", "pos", "batch"), baseline=baseline, clean=baseline + 2.0, labels=labels,
        activation_name="resid_pre", report="15 forwards",
    )  # fmt: skip


@pytest.fixture(scope="module")
def averaged(kept: PatchingResult) -> PatchingResult:
    """The same, averaged over prompts."""
    assert kept.baseline is not None
    return PatchingResult(kept.mean(), ("layer", "pos"), baseline=kept.baseline.mean(), labels={"pos": TOKENS})


@pytest.fixture(scope="module")
def several() -> PatchingResult:
    """Two metrics, three kinds of activation, prompts kept apart."""
    return PatchingResult(
        array(2, 3, 2, 4, 5), ("metric", "patch_type", "layer", "head", "batch"), baseline=array(2, 5),
        metric_names=("diff", "kl"), labels={"patch_type": ("out", "q", "k")},
    )  # fmt: skip


def test_statistics_are_what_they_are_called(kept: PatchingResult) -> None:
    values, baseline, clean = (np.asarray(x) for x in (kept.values, kept.baseline, kept.clean))
    np.testing.assert_allclose(kept.mean(), values.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(kept.stderr(), scipy.stats.sem(values, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(kept.effect(), values - baseline)
    np.testing.assert_allclose(kept.normalized(), (values - baseline) / (clean - baseline), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(kept.normalized(clean), kept.normalized())


def test_statistics_of_each_metric_use_its_own_baseline(several: PatchingResult) -> None:
    assert several.effect().shape == several.shape
    one = several["kl"]
    assert (one.axis_names, one.metric_names) == (("patch_type", "layer", "head", "batch"), ("kl",))
    np.testing.assert_array_equal(one.effect(), several.effect()[1])
    np.testing.assert_array_equal(one.permutation_pvalue(), several.permutation_pvalue()[1])
    assert one["kl"] is one
    assert several.stderr().shape == several.bootstrap_ci()[0].shape == (2, 3, 2, 4)


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_interval_agrees_with_scipy(statistic: str) -> None:
    samples = RNG.normal(3.0, 2.0, size=(2, 40))
    result = PatchingResult(jnp.asarray(samples, jnp.float32), ("layer", "batch"))
    low, high = result.bootstrap_ci(confidence=0.9, n_resamples=20_000, statistic=statistic)
    for site in range(2):
        expected = scipy.stats.bootstrap(
            samples[site : site + 1], getattr(np, statistic), confidence_level=0.9, n_resamples=20_000,
            method="percentile", rng=1,
        ).confidence_interval  # fmt: skip
        assert float(low[site]) == pytest.approx(expected.low, abs=0.05)
        assert float(high[site]) == pytest.approx(expected.high, abs=0.05)


def test_bootstrap_of_the_effect_and_seeds(kept: PatchingResult) -> None:
    first, again = kept.bootstrap_ci(of_effect=True), kept.bootstrap_ci(of_effect=True)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], kept.bootstrap_ci(of_effect=True, seed=1)[0])
    assert (np.asarray(first[0]) <= np.asarray(kept.effect().mean(-1))).all()
    constant = PatchingResult(jnp.full((1, 5), 2.5), ("layer", "batch"), baseline=jnp.zeros(5))
    assert [float(end[0]) for end in constant.bootstrap_ci()] == [2.5, 2.5]


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("prompts", [2, 6, 12])
def test_permutation_pvalue_is_scipys_exact_one(prompts: int, alternative: str) -> None:
    effects = RNG.normal(0.3, 1.0, size=(3, prompts)).astype(np.float32)
    result = PatchingResult(jnp.asarray(effects), ("layer", "batch"), baseline=jnp.zeros(prompts))
    expected = scipy.stats.permutation_test(
        (effects.astype(np.float64),), lambda x, axis: x.mean(axis), permutation_type="samples", axis=1,
        alternative=alternative, n_resamples=np.inf,
    ).pvalue  # fmt: skip
    np.testing.assert_allclose(result.permutation_pvalue(alternative=alternative), expected, rtol=1e-6)


def test_permutation_pvalue_of_many_prompts() -> None:
    effects = np.concatenate([RNG.normal(size=(2, 40)), np.ones((1, 40)), np.zeros((1, 40))])
    result = PatchingResult(jnp.asarray(effects, jnp.float32), ("layer", "batch"), baseline=jnp.zeros(40))
    pvalues = np.asarray(result.permutation_pvalue(n_permutations=4999))
    t_test = scipy.stats.ttest_1samp(effects[:2], 0.0, axis=1).pvalue
    np.testing.assert_allclose(pvalues[:2], t_test, atol=0.04)
    np.testing.assert_allclose(pvalues[2:], [1 / 5000, 1.0], rtol=1e-5)
    one_sided = result.permutation_pvalue(n_permutations=99, alternative="less")
    assert float(one_sided[2]) == 1.0


def test_resampling_in_small_chunks_changes_nothing(several: PatchingResult, monkeypatch: pytest.MonkeyPatch) -> None:
    many = PatchingResult(array(4, 20), ("layer", "batch"), baseline=array(20))

    def everything() -> list[Any]:
        return [
            several.bootstrap_ci(), several.bootstrap_ci(statistic="median"), several.permutation_pvalue(),
            many.permutation_pvalue(), many.bootstrap_ci(),
        ]  # fmt: skip

    whole = everything()
    monkeypatch.setattr(statistics, "_ENTRIES", 7_000)
    for chunked, expected in zip(everything(), whole, strict=True):
        np.testing.assert_allclose(chunked, expected, rtol=1e-6)


def test_top_skips_missing_values(averaged: PatchingResult) -> None:
    values = jnp.asarray([[1.0, jnp.nan, 3.0], [-4.0, 0.0, 2.0]])
    result = PatchingResult(values, ("layer", "pos"), baseline=jnp.asarray(1.0))
    assert result.top(3) == [((0, 2), 2.0), ((1, 2), 1.0), ((0, 0), 0.0)]
    assert len(result.top(10)) == 5
    (layer, pos), effect = averaged.top(1)[0]
    assert (
        effect == pytest.approx(float(averaged.effect()[layer, pos])) == pytest.approx(float(averaged.effect().max()))
    )


def test_top_averages_prompts(kept: PatchingResult, averaged: PatchingResult) -> None:
    for (site, effect), (same, expected) in zip(kept.top(), averaged.top(), strict=True):
        assert site == same
        assert effect == pytest.approx(expected, abs=1e-6)


def test_select_by_number_and_label(kept: PatchingResult, several: PatchingResult) -> None:
    part = kept.select(layer=-1, pos=" John")
    assert (part.axis_names, part.sizes) == (("batch",), {"batch": 5})
    np.testing.assert_array_equal(part.effect(), kept.effect()[1, 1])
    assert kept.select(batch=2).baseline == kept.baseline[2]
    assert kept.select(layer=0).labels == {"pos": TOKENS}
    queries = several.select(patch_type="q", metric="kl")
    assert (queries.metric_names, queries.patch_type_names) == (("kl",), None)
    np.testing.assert_array_equal(queries.values, several.values[1, 1])
    np.testing.assert_array_equal(queries.baseline, several.baseline[1])


def test_it_is_an_array(kept: PatchingResult) -> None:
    assert kept.shape == np.asarray(kept).shape == (2, 3, 5)
    assert np.asarray(kept, np.float64).dtype == np.float64
    assert jnp.asarray(kept) is kept.values
    assert float(jnp.max(kept)) == float(kept.values.max())
    np.testing.assert_array_equal(kept[1, 2], kept.values[1, 2])
    assert [row.shape for row in kept] == [(3, 5), (3, 5)]
    assert len(kept) == 2


def test_it_is_a_pytree(kept: PatchingResult) -> None:
    through = jax.jit(lambda result: result)(kept)
    assert (through.axis_names, through.labels, through.report) == (kept.axis_names, kept.labels, None)
    np.testing.assert_allclose(jax.jit(PatchingResult.normalized)(kept), kept.normalized(), rtol=1e-5)
    assert len(jax.tree.leaves(jax.tree.map(jnp.subtract, kept, through))) == 3
    assert "layer 2" in jax.eval_shape(lambda result: result, kept).__repr__()
    pd = pytest.importorskip("pandas")
    listed = PatchingResult(array(2), ("row",), rows=pd.DataFrame({"layer": [0, 1]}))
    assert jax.tree.map(jnp.negative, listed).rows is listed.rows


def test_repr_says_what_matters(kept: PatchingResult, several: PatchingResult) -> None:
    values = jnp.zeros((2, 3)).at[1, 1].set(-3.0)
    result = PatchingResult(
        values, ("layer", "pos"), baseline=jnp.asarray(1.0), clean=jnp.asarray(2.5), activation_name="z",
        labels={"pos": TOKENS, "layer": ("L0", "L1")}, report="6 sites",
    )  # fmt: skip
    in_numbers = "baseline 1, clean 2.5; largest effect -4 at layer 1, pos 1 ' John'"
    assert repr(result) == f"PatchingResult(z: layer 2 × pos 3; {in_numbers}; 6 sites)"
    assert repr(several).startswith(
        "PatchingResult(metric 2 × patch_type 3 × layer 2 × head 4 × batch 5; metrics diff, kl"
    )
    assert repr(PatchingResult(jnp.zeros(()), ())) == "PatchingResult(one site)"
    assert "largest" not in repr(PatchingResult(jnp.full(2, jnp.nan), ("layer",), baseline=jnp.asarray(0.0)))
    assert "15 forwards" in repr(kept)


def test_tables(kept: PatchingResult, averaged: PatchingResult, several: PatchingResult) -> None:
    pd = pytest.importorskip("pandas")
    table = kept.to_dataframe()
    assert list(table.columns) == ["metric", "layer", "pos", "example", "value"]
    assert table.iloc[8].tolist() == ["metric", 0, 1, 3, pytest.approx(float(kept.values[0, 1, 3]))]
    assert list(averaged.to_dataframe().columns) == ["metric", "layer", "pos", "value"]
    table = several.to_dataframe()
    assert list(table.columns) == ["metric", "patch_type", "layer", "head", "patch_type_name", "example", "value"]
    picked = table.query("metric == 'kl' and patch_type_name == 'q' and layer == 1 and head == 2 and example == 4")
    assert picked["value"].item() == pytest.approx(float(several.values[1, 1, 1, 2, 4]))
    assert averaged.index_df.to_numpy().tolist() == [[layer, pos] for layer in range(2) for pos in range(3)]
    rows = pd.DataFrame({"layer": [0, 1, 1], "head": [2, 0, 3]})
    listed = PatchingResult(array(3, 2), ("row", "batch"), rows=rows)
    assert listed.index_df is rows
    assert listed.to_dataframe()[["layer", "head", "example"]].to_numpy().tolist()[2:4] == [[1, 0, 0], [1, 0, 1]]


def test_tables_need_pandas(averaged: PatchingResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        averaged.to_dataframe()


@pytest.mark.parametrize("name", ["stderr", "bootstrap_ci", "permutation_pvalue"])
def test_statistics_of_averaged_prompts_are_refused(averaged: PatchingResult, name: str) -> None:
    with pytest.raises(InputError, match=r'prompts were averaged: run the sweep with reduce="none"'):
        getattr(averaged, name)()


@pytest.mark.parametrize("name", ["effect", "normalized", "top", "permutation_pvalue"])
def test_effects_need_a_baseline(name: str) -> None:
    with pytest.raises(InputError, match="has no baseline to compare with: run the sweep with baseline=True"):
        getattr(PatchingResult(array(2, 3), ("layer", "batch")), name)()


def test_nothing_to_normalise_by(kept: PatchingResult, averaged: PatchingResult) -> None:
    with pytest.raises(InputError, match=r"same metric \(.*\): nothing to normalise by"):
        averaged.normalized(averaged.baseline)
    assert kept.clean is not None
    assert kept.baseline is not None
    with pytest.raises(InputError, match=r"same metric for batch 1; batch 4: nothing to normalise by\. Leave"):
        kept.normalized(kept.clean.at[jnp.asarray([1, 4])].set(kept.baseline[jnp.asarray([1, 4])]))
    with pytest.raises(InputError, match="clean run's metric is not known here"):
        averaged.normalized()
    with pytest.raises(InputError, match=r"metric has shape \(\), the baseline \(5,\)"):
        kept.normalized(2.0)
    np.testing.assert_allclose(averaged.normalized(2.0), averaged.effect() / (2.0 - averaged.baseline), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.bootstrap_ci(statistic="mode"), "statistic is one of 'mean', 'median'; got 'mode'"),
        (lambda r: r.bootstrap_ci(confidence=95.0), r"share between 0 and 1, such as 0\.95; got 95\.0"),
        (lambda r: r.bootstrap_ci(n_resamples=0), "n_resamples must be at least 1, got 0"),
        (lambda r: r.permutation_pvalue(alternative="both"), "alternative is one of .* got 'both'"),
        (lambda r: r.select(batch=0).select(position=1), r"No axis 'position'; the axes are \('layer', 'pos'\)"),
        (lambda r: r.select(pos=3), "Axis 'pos' has 3 entries; there is no entry 3"),
        (lambda r: r.select(pos=" Mary"), "' Mary' is not among the labels of axis 'pos': give a number below 3"),
        (lambda r: r["metrics"], "No metric 'metrics' in this result; it has 'metric'. Did you mean 'metric'"),
        (lambda r: PatchingResult(r.values[..., :1], r.axis_names).stderr(), "needs at least two prompts"),
        (lambda r: PatchingResult(r.values, ("layer",)), r"shape \(2, 3, 5\), which needs 3 axis names"),
        (lambda r: PatchingResult(r.values, r.axis_names, baseline=r.values[0, 0, 0]), r"baseline has shape \(\), not"),
        (lambda r: PatchingResult(r.values, r.axis_names, labels={"pos": ("a",)}), "1 labels for axis 'pos', which"),
        (lambda r: PatchingResult(r.values, r.axis_names, metric_names=("a", "b")), "2 metric names for values"),
    ],
)  # fmt: skip
def test_mistakes(kept: PatchingResult, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(kept)


def test_effects_of_several_metrics_do_not_compare(several: PatchingResult) -> None:
    with pytest.raises(InputError, match=r"choose one of \('diff', 'kl'\) by name"):
        several.top()


def test_half_precision_values_get_full_precision_statistics() -> None:
    result = PatchingResult(array(2, 20).astype(jnp.bfloat16), ("layer", "batch"), baseline=jnp.zeros(20))
    assert result.bootstrap_ci()[0].dtype == result.permutation_pvalue().dtype == jnp.float32
    assert result.effect().dtype == jnp.bfloat16
