"""End-to-end training: the loss and its gradient by brute force, learning, resuming, starting from a dictionary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import Batch, HookedTransformer
from tljax.dictionaries import Dictionary, Tap
from tljax.dictionaries.evaluation import evaluate_dictionary
from tljax.dictionaries.training import TrainingConfig, initial_parameters, train_dictionary_end_to_end
from tljax.dictionaries.training.coefficients import numbers_of, structure_of
from tljax.dictionaries.training.end_to_end import site_of
from tljax.dictionaries.training.preparation import Preparation
from tljax.dictionaries.training.prompts import token_batches
from tljax.dictionaries.training.spliced_loss import Plan, original_run, spliced_loss
from tljax.errors import CheckpointError

POINT = "blocks.2.hook_resid_pre"
TEXTS = [
    "When John and Mary went to the store, John gave a drink to Mary.",
    "When Dan and Tom went to the park, Tom gave a book to Dan.",
    "Mary and James had a ball.",
    "When Mary and James went to the house, James gave a ring to Mary.",
]
KL, MSE, DOWNSTREAM, L1, L0, BANDWIDTH = 0.7, 0.3, 0.2, 0.05, 0.02, 0.4

CASES: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": L1},
    "gated at heads": {"architecture": "gated", "l1_coefficient": L1, "tap": Tap(reads="blocks.1.attn.hook_z")},
    "jumprelu at the embedding": {"architecture": "jumprelu", "l0_coefficient": L0, "jumprelu_bandwidth": BANDWIDTH,
                                  "jumprelu_init_threshold": 0.2, "tap": Tap(reads="hook_embed")},
    "topk transcoder": {"architecture": "topk", "k": 3, "transcoder": True, "skip": True,
                        "tap": Tap(reads="blocks.1.ln2.hook_normalized", writes="blocks.1.hook_mlp_out")},
    "batchtopk of layer norm": {"architecture": "batchtopk", "k": 3, "normalize_activations": "layer_norm",
                                "tap": Tap(reads="blocks.0.hook_resid_post")},
}  # fmt: skip


def _features(cfg: TrainingConfig, p: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Features of all tokens ``[tokens, d_sae]``, and the sums over tokens of the terms that make them sparse."""
    norms = jnp.linalg.norm(p["W_dec"], axis=1)
    u = (x - p["b_dec"][None] if cfg.subtracts_b_dec else x) @ p["W_enc"]
    if cfg.architecture == "gated":
        gate = jax.nn.relu(u + p["b_gate"][None])
        f = jnp.where(gate > 0, jax.nn.relu(u * jnp.exp(p["r_mag"])[None] + p["b_mag"][None]), 0)
        through = gate @ p["W_dec"] + p["b_dec"][None]
        return f, {"l1": L1 * (gate @ norms).sum(), "aux": ((x - through) ** 2).sum()}
    h = u + p["b_enc"][None]
    f = jax.nn.relu(h)
    if cfg.architecture == "standard":
        return f, {"l1": L1 * (f @ norms).sum()}
    if cfg.architecture == "jumprelu":
        theta = jnp.broadcast_to(p["threshold"][None], h.shape)
        near = (jnp.abs(h - theta) < BANDWIDTH / 2).astype(h.dtype) / BANDWIDTH
        slope = theta - jax.lax.stop_gradient(theta)  # 0, with the derivative of theta
        still = jax.lax.stop_gradient(theta)
        open_gate = (h > theta).astype(h.dtype)
        return f * open_gate - near * still * slope, {"l0": L0 * (open_gate - near * slope).sum()}
    scaled = jnp.asarray(f * norms[None])
    if cfg.architecture == "topk":
        kept = scaled >= jnp.sort(scaled, axis=1)[:, -3][:, None]
    else:
        kept = scaled >= jnp.sort(scaled.reshape(-1))[-3 * len(x)]
    return jnp.where(kept & (f > 0), f, 0), {}


def _brute_force(
    model: HookedTransformer, cfg: TrainingConfig, p: Any, rows: list[np.ndarray], layers: list[int]
) -> jax.Array:
    """The loss by hooks: each prompt alone, the whole model twice, a plain function in place of the activation."""
    tap, names = cfg.tap, [f"blocks.{layer}.hook_resid_pre" for layer in layers]
    reads, writes = tap.reads or "", tap.writes or tap.reads or ""
    clean = [model.run_with_cache(row[None], names_filter=[reads, writes, *names]) for row in rows]
    x = jnp.concatenate([cache[reads].reshape(len(row), -1) for row, (_, cache) in zip(rows, clean, strict=True)])
    y = jnp.concatenate([cache[writes].reshape(len(row), -1) for row, (_, cache) in zip(rows, clean, strict=True)])
    given, scale, shift = x, jnp.ones(()), jnp.zeros(())
    if cfg.normalize_activations == "layer_norm":
        shift, scale = x.mean(axis=1, keepdims=True), jnp.std(x, axis=1, keepdims=True, ddof=1)
        given = (x - shift) / (scale + 1e-5)
    f, terms = _features(cfg, p, given)
    output = (f @ p["W_dec"] + p["b_dec"][None]) * scale + shift
    output = output + x @ p["W_skip"].T if cfg.skip else output
    total = sum(terms.values()) + MSE * ((output - y) ** 2).sum()
    start = 0
    for row, (logits, cache) in zip(rows, clean, strict=True):
        own = output[start : start + len(row)]
        start += len(row)
        seen: dict[str, jax.Array] = {}
        hooks: list[Any] = [(writes, lambda value, hook, own=own: own.reshape(value.shape))]
        hooks += [(name, lambda value, hook, seen=seen: seen.update({hook.name: value})) for name in names]
        log_q = jax.nn.log_softmax(model.run_with_hooks(row[None], fwd_hooks=hooks))
        log_p = jax.nn.log_softmax(logits)
        total += KL * (jnp.exp(log_p) * (log_p - log_q)).sum()
        total += DOWNSTREAM * sum(((seen[name] - cache[name]) ** 2).sum() for name in names) / max(len(names), 1)
    return total / len(x)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_hooks(name: str, tiny: HookedTransformer) -> None:
    model = tiny
    cfg = TrainingConfig(**({"d_in": 64, "d_sae": 40, "tap": Tap(reads=POINT)} | CASES[name]))
    rng = np.random.default_rng(len(name))
    shapes = jax.eval_shape(lambda: initial_parameters(cfg))
    params = {key: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32) for key, leaf in shapes.items()}
    if "threshold" in params:
        params["threshold"] = jnp.abs(params["threshold"])
    rows = [np.arange(3, 9), np.arange(20, 23)]
    layers = [] if cfg.transcoder else [2, 3]
    batch = token_batches(model, [list(map(int, row)) for row in rows], 2, 0, (), None)(0)
    plan = Plan(
        model=model.cfg.computation, splice=site_of(model, cfg).computation, remat=cfg.transcoder,
        downstream=tuple(f"blocks.{layer}.hook_resid_pre" for layer in layers),
    )  # fmt: skip
    weights = {"kl_coefficient": KL, "mse_coefficient": MSE, "downstream_coefficient": DOWNSTREAM}
    numbers = numbers_of(cfg, 1) | {key: jnp.float32(value) for key, value in weights.items()}
    dead, structure = jnp.zeros(40, bool), structure_of(cfg, cfg.k)

    @jax.jit
    def ours(params: Any) -> Any:
        original = original_run(model.params, batch, plan)
        own = (model.params, original, batch, numbers, dead, Preparation(), plan, structure, jnp.float32(0))
        return jax.value_and_grad(spliced_loss, has_aux=True)(params, *own)

    (total, (metrics, _)), grads = ours(params)
    expected, slopes = jax.jit(jax.value_and_grad(lambda p: _brute_force(model, cfg, p, rows, layers)))(params)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert metrics["kl"] > 0.01
    for key, slope in slopes.items():
        assert np.abs(slope).max() > 0
        np.testing.assert_allclose(grads[key], slope, atol=1e-5 * np.abs(slope).max(), err_msg=key)


def _bundled(noise: float = 0.0) -> Dictionary:
    """The bundled dictionary with noise on its encoder."""
    dictionary = Dictionary.from_pretrained("tljax-tiny-res", POINT)
    W_enc = np.asarray(dictionary.W_enc)
    damage = np.random.default_rng(0).normal(size=W_enc.shape).astype(np.float32) * noise * W_enc.std()
    return dictionary.replace(params={**dictionary.params, "W_enc": W_enc + damage})


def test_what_is_logged_is_what_evaluation_measures(tiny: HookedTransformer) -> None:
    dictionary = _bundled()
    cfg = TrainingConfig.of(dictionary, lr=1e-9, l0_coefficient=0.0)
    result = train_dictionary_end_to_end(
        tiny, cfg, TEXTS, steps=1, batch_size=len(TEXTS), start=dictionary, exclude_tokens="special"
    )
    figures = evaluate_dictionary(tiny, dictionary, TEXTS, exclude_tokens="special", bootstrap=0).figures
    logged = {name: float(values[0]) for name, values in result.history.items()}
    assert logged["kl"] == pytest.approx(figures.kl_div_with_sae, rel=1e-3)
    assert logged["ce_original"] == pytest.approx(figures.ce_loss_without_sae, rel=1e-5)
    assert logged["ce_spliced"] == pytest.approx(figures.ce_loss_with_sae, rel=1e-4)
    assert logged["explained_variance"] == pytest.approx(figures.explained_variance, rel=1e-3)
    assert logged["l0"] == pytest.approx(figures.l0, rel=1e-4)


def test_a_damaged_dictionary_is_mended(tiny: HookedTransformer) -> None:
    damaged = _bundled(noise=1.0)
    cfg = TrainingConfig.of(damaged, architecture="batchtopk", k=10, lr=2e-3)
    tuned = train_dictionary_end_to_end(
        tiny, cfg, TEXTS, steps=30, batch_size=4, start=damaged, kl_coefficient="balanced", mse_coefficient=1.0
    )
    history = tuned.history
    np.testing.assert_allclose(history["kl_loss"], history["mse_loss"], rtol=1e-4)
    assert history["kl"][-1] < 0.3 * history["kl"][0]
    before, after = (
        evaluate_dictionary(tiny, one, TEXTS, bootstrap=0).figures.kl_div_with_sae
        for one in (damaged, tuned.dictionary)
    )
    assert after < 0.5 * before
    tap = tuned.dictionary.cfg.tap
    assert (tap.reads, tap.model_name, tap.processing) == (POINT, "tljax-tiny", tuple(tiny.cfg.weight_processing))


def test_fresh_parameters_learn_in_a_bfloat16_model() -> None:
    model = HookedTransformer.from_pretrained("tljax-tiny", dtype="bfloat16")
    cfg = TrainingConfig(
        d_in=64, d_sae=128, l1_coefficient=1e-3, lr=1e-2, tap=Tap(reads=POINT),
        normalize_activations="expected_average_only_in", n_batches_for_norm_estimate=1,
    )  # fmt: skip
    result = train_dictionary_end_to_end(
        model, cfg, lambda step: TEXTS, steps=40, downstream_layers="all", downstream_coefficient=0.1
    )
    assert result.dictionary.dtype == jnp.float32
    assert result.history["kl"][-1] < 0.3 * result.history["kl"][0]
    assert result.history["downstream"][-1] < 0.3 * result.history["downstream"][0]
    spliced = model.with_dictionaries(result.dictionary, error="drop")
    fresh = model.with_dictionaries(Dictionary(initial_parameters(cfg), cfg.dictionary_config()), error="drop")
    batch = model.to_batch(TEXTS, padding_side="right")
    assert spliced(batch, "loss") < fresh(batch, "loss")


def test_a_killed_run_goes_on_to_the_bit(tiny: HookedTransformer, tmp_path: Path, compilations: Any) -> None:
    batch = tiny.to_batch(TEXTS, padding_side="right")
    cfg = TrainingConfig(architecture="batchtopk", d_in=64, d_sae=96, k=8, lr=1e-2, tap=Tap(reads=POINT))

    def prompts(dies_at: int) -> Callable[[int], Batch]:
        def given(step: int) -> Batch:
            if step == dies_at:
                raise KeyboardInterrupt
            rows = np.random.default_rng(step).permutation(4)[:3]
            return Batch.from_mask(np.asarray(batch.tokens)[rows], np.asarray(batch.mask)[rows])

        return given

    def run(dies_at: int = -1, **options: Any) -> Any:
        return train_dictionary_end_to_end(tiny, cfg, prompts(dies_at), steps=5, exclude_tokens=[0], **options)

    whole = run()
    count = compilations.count
    other = run(kl_coefficient=0.5)
    assert compilations.count == count
    np.testing.assert_allclose(other.history["kl_loss"][0], whole.history["kl_loss"][0] / 2)
    with pytest.raises(KeyboardInterrupt):
        run(4, directory=tmp_path, save_every=2)
    resumed = run(directory=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"kl_coefficient: was 1\.0, is 0\.5"):
        run(directory=tmp_path, resume=True, kl_coefficient=0.5)
    with pytest.raises(CheckpointError, match="the model"):
        train_dictionary_end_to_end(
            HookedTransformer.from_pretrained_no_processing("tljax-tiny"), cfg, prompts(-1), steps=5,
            exclude_tokens=[0], directory=tmp_path, resume=True,
        )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, whole.state, resumed.state)
    for name, values in whole.history.items():
        np.testing.assert_array_equal(values, resumed.history[name])
