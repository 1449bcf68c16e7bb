"""Training runs: against torch's Adam, resumed to the bit, as stacks, on a known sparse code, folded at the end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tljax.dictionaries import Crosscoder, Dictionary, Tap
from tljax.dictionaries.evaluation import ground_truth_scores
from tljax.dictionaries.training import (
    TrainingConfig,
    dictionary_loss,
    gradients,
    initial_parameters,
    prepare,
    train_dictionaries,
    train_dictionary,
    trainer,
)

D, F, TOKENS = 16, 48, 64
GOLDENS = Path(__file__).parents[4] / "shared" / "goldens" / "dictionaries" / "saelens" / "trainer_runs"


def _batch(step: int) -> np.ndarray:
    return np.random.default_rng([5, step]).normal(size=(TOKENS, D)).astype(np.float32) * 2 + 0.3


def _cfg(**fields: Any) -> TrainingConfig:
    return TrainingConfig(**({"d_in": D, "d_sae": F, "lr": 1e-2} | fields))


def test_steps_are_those_of_torch() -> None:
    cfg = _cfg(l1_coefficient=0.5, l1_warm_up_steps=4, lr_warm_up_steps=3, lr_decay_steps=2)
    start = initial_parameters(cfg)
    params = {name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in start.items()}
    adam = torch.optim.Adam(params.values(), lr=1.0)
    rates = (1 / 3, 2 / 3, 1, 1, 1, 0.5)
    for step, rate in enumerate(rates):
        x = torch.tensor(_batch(step))
        f = torch.relu((x - params["b_dec"]) @ params["W_enc"] + params["b_enc"])
        out = f @ params["W_dec"] + params["b_dec"]
        weight = 0.5 * min(step / 4, 1)
        loss = ((out - x) ** 2).sum(dim=-1).mean() + weight * (f * params["W_dec"].norm(dim=-1)).sum(dim=-1).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        adam.param_groups[0]["lr"] = 1e-2 * rate
        adam.step()
    result = train_dictionary(cfg, _batch, steps=len(rates))
    np.testing.assert_allclose(result.history["lr"], 1e-2 * np.asarray(rates), rtol=1e-6)
    np.testing.assert_allclose(result.history["loss"][-1], loss.item(), rtol=1e-5)  # pyright: ignore
    for name, value in params.items():
        np.testing.assert_allclose(result.state.params[name], value.detach().numpy(), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_run_that_was_killed_goes_on_to_the_bit(stacked: bool, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"architecture": "batchtopk", "normalize_activations": "expected_average_only_in"}
    fields |= {"n_batches_for_norm_estimate": 2, "dead_feature_window": 2, "k": 3}
    cfgs = [_cfg(**fields, seed=seed) for seed in ((0, 1) if stacked else (0,))]
    reached = []

    def killed(step: int) -> np.ndarray:
        reached.append(step)
        if step == 7:
            raise KeyboardInterrupt
        return _batch(step)

    def run(batches: Callable[[int], np.ndarray], **options: Any) -> Any:
        if stacked:
            return train_dictionaries(cfgs, batches, steps=9, **options)
        return [train_dictionary(cfgs[0], batches, steps=9, **options)]

    whole = run(_batch)
    with pytest.raises(KeyboardInterrupt):
        run(killed, directory=tmp_path, save_every=4)
    resumed = run(_batch, directory=tmp_path, resume=True, save_every=4, log_every=1)
    for one, other in zip(whole, resumed, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.state, other.state)
        assert one.history.keys() == other.history.keys()
        for name, values in one.history.items():
            np.testing.assert_array_equal(values, other.history[name])
        jax.tree.map(np.testing.assert_array_equal, one.dictionary.params, other.dictionary.params)
    again = run(killed, directory=tmp_path, resume=True)  # complete: nothing is trained
    np.testing.assert_array_equal(again[0].history["loss"], whole[0].history["loss"])
    for number, result in enumerate(whole):  # beside the state, in SAELens's layout
        saved = Dictionary.load(tmp_path / str(number) if stacked else tmp_path)
        assert saved.cfg.architecture == "jumprelu"
        jax.tree.map(np.testing.assert_array_equal, saved.params, result.dictionary.params)
    files = ["cfg.json", "dictionary_training_state.safetensors", "sae_weights.safetensors", "sparsity.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == (["0", "1", files[1]] if stacked else files)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "jumprelu"])
def test_a_stack_is_its_members(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: list[dict[str, Any]] = {
        "standard": [{"l1_coefficient": 0.1}, {"l1_coefficient": 2.0, "lr": 3e-3}, {"seed": 4}],
        "jumprelu": [{"l0_target": 5.0}, {"l0_target": 9.0, "l0_warm_up_steps": 3}],
        "topk": [{"k": 2}, {"k": 7, "aux_loss_coefficient": 0.2}],
        "batchtopk": [{"k": 2}, {"k": 7, "dead_feature_window": 0}],
    }[architecture]
    cfgs = [_cfg(**({"architecture": architecture, "dead_feature_window": 1} | each)) for each in fields]
    monkeypatch.setattr(trainer, "members_at_once", lambda members: members)  # side by side, as on a GPU
    stack = train_dictionaries(cfgs, _batch, steps=5)
    monkeypatch.undo()
    monkeypatch.setattr(gradients, "_CHUNK_BYTES", 16 * F * 4)  # chunks of 16 rows, members in turn
    chunked = train_dictionaries(cfgs, _batch, steps=5)
    monkeypatch.undo()
    for cfg, one, other in zip(cfgs, stack, chunked, strict=True):
        alone = train_dictionary(cfg, _batch, steps=5)
        for result in (one, other):
            assert result.history["loss"].shape == (5,)
            np.testing.assert_allclose(result.history["loss"], alone.history["loss"], rtol=1e-4)
            np.testing.assert_allclose(result.dictionary.W_dec, alone.dictionary.W_dec, atol=2e-4)
            np.testing.assert_allclose(result.history["dead_features"], alone.history["dead_features"])


def test_other_numbers_compile_nothing(compilations: Any) -> None:
    cfg = _cfg(architecture="batchtopk", k=2)
    train_dictionary(cfg, _batch, steps=2)
    before = compilations.count
    other = cfg.replace(k=5, lr=1e-3, seed=9, dead_feature_window=3, lr_warm_up_steps=2, topk_threshold_lr=0.5)
    logged: list[dict[str, Any]] = []
    result = train_dictionary(other, _batch, steps=4, log_every=2, on_log=logged.append)
    assert compilations.count == before
    assert [entry["step"] for entry in logged] == [2, 4]
    assert result.history["l0"].max() <= 5


@pytest.fixture(scope="module")
def toy() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions of 64 features in 32 dimensions, codes of which 3 are active on average, and their signs."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(64, 32))
    for _ in range(200):  # push apart what is closer than 0.3
        true /= np.linalg.norm(true, axis=1, keepdims=True)
        close = true @ true.T - np.eye(64)
        true -= 0.05 * (close * (np.abs(close) > 0.3)) @ true
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    codes = (rng.random((40_000, 64)) < 3 / 64) * rng.uniform(0.5, 1.5, (40_000, 64))
    return true, codes, rng.choice([-1, 1], codes.shape)


def test_known_features_are_found(toy: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    true, codes, _ = toy
    rows = (codes @ true).astype(np.float32)
    cfgs = [
        TrainingConfig(architecture="batchtopk", k=k, d_in=32, d_sae=96, lr=5e-3, dead_feature_window=50, seed=seed)
        for k, seed in ((3, 0), (3, 1), (4, 2))
    ]
    for result in train_dictionaries(cfgs, rows, steps=700, batch_size=512):
        directions = np.asarray(result.dictionary.W_dec)
        assert np.allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-5)
        assert ((directions @ true.T).max(axis=0) >= 0.9).mean() >= 0.95
        features = result.dictionary.encode(jnp.asarray(rows[:2000]))
        assert abs(float((features > 0).sum(axis=1).mean()) - (result.cfg.k or 0)) < 0.5
        assert result.history["explained_variance"][-1] > 0.85


RECOVERING: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.5},
    "gated": {"l1_coefficient": 1.0},
    "jumprelu": {"l0_target": 3.0, "l0_coefficient": 0.1, "jumprelu_bandwidth": 0.1},
    "topk": {"k": 4},
    "abstopk": {"k": 4},
}
"""Architecture → its settings; ``abstopk`` gets codes of both signs."""


@pytest.mark.parametrize("architecture", RECOVERING)
def test_each_architecture_finds_them(architecture: Any, toy: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    true, codes, signs = toy
    codes = codes * signs if architecture == "abstopk" else codes
    rows = (codes @ true).astype(np.float32)
    cfg = TrainingConfig(
        architecture=architecture, d_in=32, d_sae=96, lr=5e-3, dead_feature_window=50, **RECOVERING[architecture]
    )
    dictionary = train_dictionary(cfg, rows, steps=300, batch_size=256).dictionary
    scores = ground_truth_scores(dictionary, true, activations=jnp.asarray(rows[:2000]), codes=codes[:2000])
    assert scores.recovered >= 0.95
    assert scores.correlations is not None
    assert np.median(scores.correlations) > 0.8


FOLDED = {
    "scale": {"architecture": "batchtopk", "k": 3, "normalize_activations": "expected_average_only_in"},
    "whitening": {"architecture": "batchtopk", "k": 3, "normalize_activations": "covariance_whitening"},
    "whitened topk": {"architecture": "topk", "k": 3, "normalize_activations": "covariance_whitening"},
    "standard": {"normalize_activations": "expected_average_only_in"},
    "gated": {"architecture": "gated", "normalize_activations": "covariance_whitening"},
    "jumprelu": {"architecture": "jumprelu", "normalize_activations": "expected_average_only_in"},
    "layer_norm": {"architecture": "topk", "k": 3, "normalize_activations": "layer_norm"},
    "unit rows": {"architecture": "topk", "k": 3, "decoder_norm": "unit", "b_dec_init": "geometric_median"},
    "matching pursuit": {"architecture": "matching_pursuit", "max_iterations": 3,
                         "normalize_activations": "expected_average_only_in"},
    "transcoder": {"transcoder": True, "skip": True, "architecture": "topk", "k": 3,
                   "normalize_activations": "expected_average_only_in"},
    "crosscoder": {"n_sources": 2, "architecture": "topk", "k": 3, "normalize_activations": "expected_average_only_in"},
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_the_dictionary_does_to_raw_activations_what_was_trained(name: str) -> None:
    cfg = _cfg(**FOLDED[name], n_batches_for_norm_estimate=3)
    pair = np.stack([_batch(0), _batch(1) * 3], axis=1)
    x: Any = pair if cfg.n_sources else pair[:, 0]
    y = pair[:, 1] if cfg.transcoder else x
    result = train_dictionary(cfg, lambda step: (x, y) if cfg.transcoder else x, steps=4)
    state, dictionary = result.state, result.dictionary
    flat, target = (jnp.asarray(value.reshape(TOKENS, -1)) for value in (x, y))
    inputs, targets = result.preparation.apply(flat, target if cfg.transcoder else None)
    losses = dictionary_loss(state.params, inputs, cfg, targets=targets)
    if cfg.architecture == "batchtopk":  # the threshold of the running average takes the place of the batch's
        features = dictionary.encode(x)
        level = features[features > 0].min()
        np.testing.assert_allclose(dictionary.params["threshold"], dictionary.params["threshold"][0])
        assert level > dictionary.params["threshold"][0]
        return
    reconstruction, features = dictionary(x)
    assert isinstance(dictionary, Crosscoder if cfg.n_sources else Dictionary)
    np.testing.assert_array_equal(features != 0, losses.features != 0)
    error = np.asarray(reconstruction).reshape(TOKENS, -1) - np.asarray(target)
    scale = result.preparation.scale_out
    if scale is not None:
        parts = np.repeat(np.atleast_1d(np.asarray(scale)), error.shape[1] // np.size(scale))
        np.testing.assert_allclose((error * parts) ** 2, (losses.reconstruction - targets) ** 2, atol=1e-3)
    elif cfg.normalize_activations != "covariance_whitening":
        np.testing.assert_allclose((error**2).sum(axis=1).mean(), losses.terms["mse_loss"], rtol=1e-4)
    else:
        whitening = result.preparation.whitening
        assert whitening is not None
        raw = losses.reconstruction @ whitening.colour + whitening.mean[None]
        np.testing.assert_allclose(reconstruction, raw, atol=1e-3)


def test_unit_rows_stay_so_and_their_gradient_goes_across() -> None:
    cfg = _cfg(architecture="topk", k=3, decoder_norm="unit", lr=1e-4)
    start = initial_parameters(cfg)
    state = train_dictionary(cfg, _batch, steps=1).state
    np.testing.assert_allclose(jnp.linalg.norm(state.params["W_dec"], axis=1), 1, rtol=1e-6)
    along = (state.optimizer.mu["W_dec"] * start["W_dec"]).sum(axis=1)
    assert np.abs(along).max() < 1e-6 < np.abs(state.optimizer.mu["W_dec"]).max()


def test_a_reader_is_read_at_the_tap(tmp_path: Path) -> None:
    cfg = _cfg(transcoder=True, tap=Tap(reads="in", writes="out"))
    x, y = _batch(0), _batch(1)
    by_name = train_dictionary(cfg, lambda step: {"other": x, "out": y, "in": x}, steps=2)
    by_place = train_dictionary(cfg, lambda step: (x, y), steps=2)
    np.testing.assert_array_equal(by_name.history["loss"], by_place.history["loss"])
    by_name.dictionary.save(tmp_path)
    loaded = Dictionary.load(tmp_path)
    np.testing.assert_array_equal(loaded.encode(x), by_name.dictionary.encode(x))
    assert (loaded.cfg.tap.reads, loaded.cfg.tap.writes) == ("in", "out")


def test_a_trained_dictionary_is_saved_as_saelens_saves_it(tmp_path: Path) -> None:
    result = train_dictionary(_cfg(architecture="batchtopk", k=2, matryoshka_widths=(12,)), _batch, steps=3)
    result.dictionary.save(tmp_path)
    stored = json.loads((tmp_path / "cfg.json").read_text())
    assert stored["architecture"] == "jumprelu"
    assert stored["metadata"]["training_architecture"] == "matryoshka_batchtopk"
    assert stored["metadata"]["l0"] == pytest.approx(2)
    loaded = Dictionary.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, result.dictionary.params)
    np.testing.assert_allclose(loaded.sparsity, result.dictionary.sparsity)
    assert float((10 ** np.asarray(loaded.sparsity)).sum()) == pytest.approx(2, rel=1e-4)


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="the shared goldens are not here")
@pytest.mark.parametrize("name", ["standard_adam_3_steps", "batchtopk_adam_3_steps", "batchtopk_fit_norm_estimate"])
def test_runs_are_saelens(name: str) -> None:
    case = json.loads((GOLDENS / "cases.json").read_text())[name]
    stored = json.loads((GOLDENS / name / "start" / "cfg.json").read_text())
    start = load_file(GOLDENS / name / "start" / "sae_weights.safetensors")
    io = load_file(GOLDENS / name / "io.safetensors")
    fields = {key: stored[key] for key in ("l1_coefficient", "l1_warm_up_steps", "k", "architecture") if key in stored}
    fields |= {key: case["trainer"][key] for key in ("lr", "lr_warm_up_steps", "dead_feature_window")}
    fields |= {"normalize_activations": stored["normalize_activations"], "n_batches_for_norm_estimate": 4}
    cfg = TrainingConfig(d_in=stored["d_in"], d_sae=stored["d_sae"], **fields)
    preparation, skipped = None, 0
    if cfg.normalize_activations != "none":  # SAELens uses up the batches of the estimate
        preparation, skipped = prepare(cfg, lambda step: io["batches"][step]), 4
    batches = io["batches"][skipped:]
    result = train_dictionary(cfg, lambda step: batches[step], steps=len(batches), start=start, preparation=preparation)
    for number, step in enumerate(case["steps"]):
        for term, value in step["losses"].items():
            np.testing.assert_allclose(result.history[term][number], value, rtol=5e-6, err_msg=f"{number} {term}")
        assert result.history["dead_features"][number] == step["dead_before"]
        assert result.history["lr"][number] == pytest.approx(step["lr"])
        if step["topk_threshold"] is not None:
            assert result.history["topk_threshold"][number] == pytest.approx(step["topk_threshold"], rel=1e-6)
    expected = {key.removeprefix("after_step2."): value for key, value in io.items() if key.startswith("after_step2.")}
    params = result.state.params
    if skipped:
        expected = load_file(GOLDENS / name / "final_inference" / "sae_weights.safetensors")
        params = result.dictionary.params
    for key, value in expected.items():
        np.testing.assert_allclose(params[key], value, atol=2e-6 * np.abs(value).max(), err_msg=key)
