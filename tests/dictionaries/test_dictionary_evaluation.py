"""``evaluate_dictionary``: definitions by hand, SAELens's numbers, splices by plain hooks, intervals."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_dictionaries import standard
from safetensors.numpy import load_file

from tljax import HookedTransformer
from tljax.dictionaries import Crosscoder, CrosscoderConfig, Dictionary, DictionaryConfig, Tap
from tljax.dictionaries.evaluation import Figures, evaluate_dictionary, weight_figures
from tljax.dictionaries.evaluation.figures import LOSS_SUMS, TOKEN_SUMS, Sums
from tljax.dictionaries.evaluation.measuring import measure_site
from tljax.dictionaries.evaluation.sites import Sites

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens" / "dictionaries"
POINT = "blocks.1.hook_resid_pre"
RAGGED = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3], [3, 5, 8, 9, 7, 1], [9, 3, 2, 3], [8, 4, 6, 2, 6, 4]]
"""Five prompts, so that the last batch of two is filled up."""


def identity(width: int, point: str, **tap: Any) -> Dictionary:
    """A dictionary that reconstructs everything: features for both signs of each coordinate."""
    both = np.concatenate([np.eye(width), -np.eye(width)]).astype(np.float32)
    return standard(both.T, both, reads=point, **tap)


def brute_force(
    model: HookedTransformer, sae: Dictionary, rows: list[list[int]], excluded: list[int]
) -> dict[str, float]:
    """The definitions, prompt by prompt, in float64, with plain Python hooks."""
    x, x_hat, losses = [], [], []
    for row in rows:
        kept = ~np.isin(row, excluded)
        logits, cache = model.run_with_cache(jnp.asarray([row]))
        value = cache[POINT]
        made = sae(value).reconstruction
        spliced = model.run_with_hooks(
            jnp.asarray([row]), fwd_hooks=[(POINT, lambda a, hook, k=kept, m=made: jnp.where(k[None, :, None], m, a))]
        )
        ablated = model.run_with_hooks(jnp.asarray([row]), fwd_hooks=[(POINT, lambda a, hook: 0 * a)])
        x.append(np.asarray(value[0], np.float64)[kept])
        x_hat.append(np.asarray(made[0], np.float64)[kept])
        logs = [np.asarray(jax.nn.log_softmax(one[0]), np.float64) for one in (logits, spliced, ablated)]
        nll = [-one[np.arange(len(row) - 1), row[1:]][kept[:-1]] for one in logs]
        kl = [(np.exp(logs[0]) * (logs[0] - one)).sum(-1)[kept] for one in logs[1:]]
        losses.append([*nll, *kl])
    clean, with_sae, zero, kl, kl_zero = (np.concatenate(part).mean() for part in zip(*losses, strict=True))
    a, b = np.concatenate(x), np.concatenate(x_hat)
    error = ((a - b) ** 2).sum(-1)
    return {
        "mse": error.mean(),
        "explained_variance": 1 - error.mean() / ((a - a.mean(0)) ** 2).sum(-1).mean(),
        "explained_variance_centered": 1 - (a - b).var(0).sum() / a.var(0).sum(),
        "relative_error": (error / (a**2).sum(-1)).mean(),
        "l2_ratio": (np.linalg.norm(b, axis=-1) / np.linalg.norm(a, axis=-1)).mean(),
        "relative_reconstruction_bias": (b**2).sum() / (a * b).sum(),
        "ce_loss_without_sae": clean,
        "ce_loss_with_sae": with_sae,
        "ce_loss_with_ablation": zero,
        "ce_loss_increase": with_sae - clean,
        "ce_loss_score": (zero - with_sae) / (zero - clean),
        "kl_div_with_sae": kl,
        "kl_div_score": (kl_zero - kl) / kl_zero,
    }


@pytest.fixture(scope="module")
def small_sae(model: HookedTransformer) -> Dictionary:
    g, d = np.random.default_rng(0), model.cfg.d_model
    return standard(g.normal(size=(d, 24)) / 4, g.normal(size=(24, d)) / 4, g.normal(size=24) / 4, reads=POINT)


@pytest.mark.parametrize("excluded", [[], [3, 5]])
def test_numbers_are_those_of_the_definitions(
    model: HookedTransformer, small_sae: Dictionary, excluded: list[int]
) -> None:
    got = evaluate_dictionary(
        model, small_sae, RAGGED, batch_size=2, exclude_tokens=excluded, bootstrap=0, progress=False
    )
    want = brute_force(model, small_sae, RAGGED, excluded)
    for name, value in want.items():
        assert getattr(got.figures, name) == pytest.approx(value, rel=2e-5), name
    tokens = np.concatenate(RAGGED)
    assert got.figures.n_tokens == (~np.isin(tokens, excluded)).sum()
    assert (got.n_prompts, got.n_text_tokens, got.low) == (5, len(tokens), None)
    assert got.figures.fvu == pytest.approx(1 - got.figures.explained_variance)


def test_batches_do_not_matter_and_compile_once(
    model: HookedTransformer, small_sae: Dictionary, compilations: Any
) -> None:
    options: dict[str, Any] = {"bootstrap": 0, "progress": False}
    one = evaluate_dictionary(model, small_sae, RAGGED, batch_size=2, **options)
    before = compilations.count
    again = evaluate_dictionary(model, small_sae, RAGGED[::-1], batch_size=2, **options)
    assert compilations.count == before
    whole = evaluate_dictionary(model, small_sae, RAGGED, batch_size=5, **options)
    by_batch = ("explained_variance_legacy",)
    for name, value in vars(one.figures).items():
        if name not in by_batch:
            assert getattr(again.figures, name) == pytest.approx(value, rel=1e-5), name
            assert getattr(whole.figures, name) == pytest.approx(value, rel=1e-5), name
    np.testing.assert_allclose(whole.features.density, one.features.density)


def test_identity_scores_one_and_zero_scores_zero(model: HookedTransformer) -> None:
    d = model.cfg.d_model
    options: dict[str, Any] = {"bootstrap": 0, "progress": False}
    same = evaluate_dictionary(model, identity(d, POINT), RAGGED, **options).figures
    assert same.explained_variance == pytest.approx(1, abs=1e-5)
    assert (same.ce_loss_score, same.kl_div_score) == (pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-4))
    assert same.l2_ratio == pytest.approx(1, abs=1e-5)
    nothing = standard(np.zeros((d, 4)), np.zeros((4, d)), reads=POINT)
    zero = evaluate_dictionary(model, nothing, RAGGED, **options)
    assert (zero.figures.ce_loss_score, zero.figures.kl_div_score) == (0, 0)
    assert (zero.figures.l0, zero.figures.l2_norm_out, len(zero.dead)) == (0, 0, 4)


def test_heads_transcoders_and_crosscoders_are_compared_where_they_write(model: HookedTransformer) -> None:
    cfg, options = model.cfg, {"bootstrap": 0, "progress": False}
    heads = identity(cfg.n_heads * cfg.d_head, "blocks.1.attn.hook_z", merged_heads=True)
    assert evaluate_dictionary(model, heads, RAGGED, **options).figures.ce_loss_score == pytest.approx(1, abs=1e-4)
    one_head = identity(cfg.d_head, "blocks.1.attn.hook_z", head=1)
    assert evaluate_dictionary(model, one_head, RAGGED, **options).figures.kl_div_with_sae == pytest.approx(0, abs=1e-6)

    width = cfg.d_model
    tap = Tap(reads="blocks.1.ln2.hook_normalized", writes="blocks.1.hook_mlp_out")
    transcoder = DictionaryConfig(d_in=width, d_sae=6, transcoder=True, apply_b_dec_to_input=False, tap=tap)
    g = np.random.default_rng(1)
    params = {"W_enc": g.normal(size=(width, 6)), "b_enc": np.ones(6), "W_dec": g.normal(size=(6, width))}
    made = Dictionary(
        {k: v.astype(np.float32) for k, v in params.items()} | {"b_dec": np.ones(width, np.float32)}, transcoder
    )
    got = evaluate_dictionary(model, made, RAGGED, **options)
    _, cache = model.run_with_cache(model.to_batch(RAGGED, padding_side="right"))
    text = np.asarray(model.to_batch(RAGGED, padding_side="right").mask)
    y, y_hat = np.asarray(cache[tap.writes])[text], np.asarray(made(cache[tap.reads]).reconstruction)[text]
    assert got.figures.mse == pytest.approx(((y - y_hat) ** 2).sum(-1).mean(), rel=1e-5)

    taps = (Tap(reads="blocks.0.hook_resid_post"), Tap(reads="blocks.2.hook_resid_post"))
    both = np.concatenate([np.eye(2 * width), -np.eye(2 * width)]).astype(np.float32).reshape(-1, 2, width)
    cross = Crosscoder(
        {"W_enc": both.transpose(1, 2, 0), "b_enc": np.zeros(4 * width, np.float32), "W_dec": both,
         "b_dec": np.zeros((2, width), np.float32)},
        CrosscoderConfig(n_sources=2, d_in=width, d_sae=4 * width, taps=taps),
    )  # fmt: skip
    got = evaluate_dictionary(model, cross, RAGGED, **options)
    assert got.figures.explained_variance == pytest.approx(1, abs=1e-5)
    assert got.figures.ce_loss_increase == pytest.approx(0, abs=1e-5)
    assert got.writes == ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")


def test_dead_and_density_by_hand(model: HookedTransformer) -> None:
    d = model.cfg.d_model
    encoder = np.zeros((d, 3), np.float32)
    sae = standard(encoder, np.ones((3, d)), np.asarray([1.0, -1.0, 0.5]), reads=POINT)
    got = evaluate_dictionary(model, sae, RAGGED, exclude_tokens=[9], bootstrap=0, progress=False, run_spliced=False)
    assert got.features.density.tolist() == [1, 0, 1]
    assert got.dead.tolist() == [1]
    n = sum(token != 9 for row in RAGGED for token in row)
    assert got.features.consistent_activation_heuristic[0] == n / len(RAGGED)
    assert got.features.mean_activation[[0, 2]].tolist() == [1, 0.5]
    assert got.features.largest_activation.tolist() == [1, 0, 0.5]
    assert (got.figures.l0, got.figures.l1) == (2, 1.5)
    counts, edges = got.density_histogram
    assert counts.sum() == 2
    assert counts[-1] == 2
    assert edges[-1] == 0
    assert np.isnan(got.figures.ce_loss_score)
    assert got.by_position.n_tokens.tolist() == [4, 5, 5, 4, 3, 2]


def test_a_massive_token_shows_as_such() -> None:
    """4,096 tokens of known variance: one huge token decides the ratio of means, and not the mean of ratios."""
    g = np.random.default_rng(0)
    x = g.normal(size=(32, 128, 16)).astype(np.float32)
    x[3, 0] *= 300
    quarter = standard(np.zeros((16, 1)), np.zeros((1, 16)), reads="x")
    sites = Sites(("x",), ("x",), (None,))
    half = identity(16, "x").replace(params=dict(identity(16, "x").params) | {"W_dec": identity(16, "x").W_dec / 2})
    counts = np.ones((32, 128), bool)

    def figures(sae: Dictionary, counted: np.ndarray, which: str = "") -> Figures:
        shift = jnp.full(16, 3.0)  # any vector gives the same variance
        made = measure_site(sae, sites, {"x": jnp.asarray(x)}, jnp.asarray(counted), shift, np.float32(10))
        assert int(made.massive.sum()) == counted[3, 0]
        table = np.asarray(made.tokens, np.float64)
        table = np.concatenate([table, np.zeros((32, 128, len(LOSS_SUMS)))], -1).reshape(
            -1, len(TOKEN_SUMS) + len(LOSS_SUMS)
        )
        vectors = [np.asarray(made.targets, np.float64).sum(0), np.asarray(made.errors, np.float64).sum(0)]
        return Figures.of(Sums(table.sum(0)[None], vectors[0][None], vectors[1][None])).group(0)

    flat = x.reshape(-1, 16).astype(np.float64)
    spread = ((flat - flat.mean(0)) ** 2).sum(-1)
    halved = figures(half, counts)
    assert halved.explained_variance == pytest.approx(1 - (flat**2 / 4).sum(-1).mean() / spread.mean(), rel=1e-5)
    assert halved.explained_variance_legacy == pytest.approx(1 - ((flat**2 / 4).sum(-1) / spread).mean(), rel=1e-5)
    assert halved.explained_variance_centered == pytest.approx(0.75, rel=1e-5)
    assert halved.relative_error == pytest.approx(0.25, rel=1e-5)
    assert (halved.l2_ratio, halved.relative_reconstruction_bias) == (pytest.approx(0.5), pytest.approx(0.5))
    without = counts.copy()
    without[3, 0] = False
    assert figures(half, without).explained_variance == pytest.approx(0.75, abs=1e-3)
    assert figures(quarter, counts).mse > 10 * figures(quarter, without).mse


def test_massive_tokens_are_split_out(model: HookedTransformer, small_sae: Dictionary) -> None:
    embed = np.array(model.params["embed"]["W_E"])
    embed[8] *= 1000
    changed = model.replace(params={**model.params, "embed": {"W_E": embed}})
    got = evaluate_dictionary(changed, small_sae, RAGGED, bootstrap=0, progress=False, run_spliced=False)
    assert (got.massive.n_tokens, got.ordinary.n_tokens) == (2, got.figures.n_tokens - 2)
    assert got.figures.mse > 100 * got.ordinary.mse
    plain = evaluate_dictionary(
        changed, small_sae, RAGGED, exclude_tokens=[8], bootstrap=0, progress=False, run_spliced=False
    )
    assert got.ordinary.mse == pytest.approx(plain.figures.mse, rel=1e-4)
    assert "2 tokens of a massive norm" in repr(got)


def test_intervals_hold_the_number_and_narrow_with_more_prompts(
    model: HookedTransformer, small_sae: Dictionary
) -> None:
    rows = np.random.default_rng(5).integers(0, 13, (64, 6))
    options: dict[str, Any] = {"progress": False, "batch_size": 16, "run_spliced": False}
    few = evaluate_dictionary(model, small_sae, rows[:16], **options)
    many = evaluate_dictionary(model, small_sae, rows, **options)
    assert many.low is not None
    assert many.high is not None
    assert few.low is not None
    assert few.high is not None
    for name in ("mse", "l0", "cossim"):
        assert getattr(many.low, name) < getattr(many.figures, name) < getattr(many.high, name)
        assert getattr(many.high, name) - getattr(many.low, name) < getattr(few.high, name) - getattr(few.low, name)
    again = evaluate_dictionary(model, small_sae, rows, **options, seed=0)
    assert again.to_dict()["low"]["mse"] == many.low.mse
    json.dumps(many.to_dict())
    text = repr(many)
    assert "explained_variance" in text
    assert "[" in text
    assert "ce_loss_score" not in text


def test_weights_by_hand() -> None:
    sae = standard(
        np.asarray([[3.0, 0, 1], [4, 1, 0]]), np.asarray([[3.0, 4], [0, -1], [0, 0]]), np.arange(3.0), reads="x"
    )
    got = weight_figures(sae)
    assert got.encoder_norm.tolist() == [5, 1, 1]
    assert got.decoder_norm.tolist() == [5, 1, 0]
    np.testing.assert_allclose(got.encoder_decoder_cosine_sim, [1, -1, np.nan])
    np.testing.assert_allclose(got.max_decoder_cosine_sim, [0, 0, np.nan], atol=1e-7)
    assert got.encoder_bias.tolist() == [0, 1, 2]


def read_saelens(folder: Path) -> Dictionary:
    cfg = json.loads((folder / "cfg.json").read_text())
    own = {key: cfg[key] for key in ("architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input") if key in cfg}
    tap = Tap(reads=cfg["metadata"]["hook_name"], merged_heads=cfg["reshape_activations"] == "hook_z")
    rescaled = cfg.get("rescale_acts_by_decoder_norm", False)
    made = DictionaryConfig(**own, rescale_acts_by_decoder_norm=rescaled, tap=tap)
    return Dictionary(load_file(folder / "sae_weights.safetensors"), made)


@pytest.mark.skipif(not GOLDENS.exists(), reason="the shared goldens are not here")
@pytest.mark.parametrize("case", ["good_standard", "standard_resid_pre", "topk_hook_z", "jumprelu_mlp_out"])
def test_saelens_numbers(case: str) -> None:
    """Every number within 1e-5; a score is compared to what its float32 terms leave of it."""
    folder = GOLDENS / "saelens"
    golden = json.loads((folder / "evaluation" / f"{case}.json").read_text())
    model = HookedTransformer.from_pretrained_no_processing(str(GOLDENS / "base_model"))
    at = folder / golden["sae"]
    sae = read_saelens(at if (at / "cfg.json").exists() else at / "sae")
    tokens = load_file(folder / "evaluation" / f"{case}.tokens.safetensors")["tokens"]
    for run, excluded in (("all_tokens", None), ("exclude_token_0", [0])):
        want = golden["runs"][run]
        got = evaluate_dictionary(
            model, sae, tokens.reshape(-1, 16), batch_size=4, exclude_tokens=excluded, bootstrap=0, progress=False
        ).saelens()
        ce = want["metrics"]["model_performance_preservation"]
        lost = abs(ce["ce_loss_with_ablation"]) / abs(ce["ce_loss_with_ablation"] - ce["ce_loss_without_sae"])
        for group, numbers in want["metrics"].items():
            for name, value in numbers.items():
                tolerance = max(1e-5, 3e-7 * lost) if name == "ce_loss_score" else 1e-5
                assert got["metrics"][group][name] == pytest.approx(value, rel=tolerance), (run, name)
        for name, values in want["feature_metrics"].items():
            mine = got["feature_metrics"][name]
            np.testing.assert_allclose(mine, np.asarray(values, float), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("point", [POINT, "blocks.1.hook_mlp_out"])
def test_the_spliced_run_is_that_of_a_spliced_model(
    model: HookedTransformer, small_sae: Dictionary, point: str
) -> None:
    sae = small_sae.replace(cfg=small_sae.cfg.replace(tap=Tap(reads=point)))
    rows = jnp.asarray(RAGGED[::2])
    got = evaluate_dictionary(model, sae, rows, exclude_tokens=[3], bootstrap=0, progress=False).figures
    spliced = model.with_dictionaries([sae], error="drop", exclude_tokens=[3])
    losses = np.asarray(spliced(rows, return_type="loss", loss_per_token=True))
    assert got.ce_loss_with_sae == pytest.approx(losses[np.asarray(rows)[:, :-1] != 3].mean(), rel=1e-5)
