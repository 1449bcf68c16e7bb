"""The trainer: learns, resumes to the bit, and says what is wrong with a batch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import same_bits
from safetensors.numpy import load_file

from tljax import HookedTransformer, HookedTransformerConfig, Zero
from tljax.errors import CheckpointError, ConfigError, InputError
from tljax.train import TrainConfig, TrainingError, next_token_loss, train
from tljax.train.batches import rows_of
from tljax.train.checkpoint import FILE

ROWS = np.tile(np.arange(6, dtype=np.int32), (16, 1))


@pytest.fixture(scope="module")
def start() -> HookedTransformer:
    cfg = HookedTransformerConfig(d_model=8, n_heads=2, n_layers=1, n_ctx=6, d_vocab=7, act_fn="gelu", seed=3)
    return HookedTransformer(cfg)


def config(**changes: object) -> TrainConfig:
    fields = {"steps": 12, "batch_size": 4, "learning_rate": 0.02, "warmup_steps": 2, "log_every": 4, "progress": False}
    return TrainConfig(**(fields | changes))


def noisy_batch(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 7, (4, 5))


def test_loss_falls_and_the_model_given_is_untouched(start: HookedTransformer) -> None:
    before = jax.tree.map(np.asarray, start.params)
    result = train(start, ROWS, config(steps=40, log_every=10))
    losses = [entry["loss"] for entry in result.history]
    assert [entry["step"] for entry in result.history] == [10, 20, 30, 40]
    assert losses[-1] < 0.3 * losses[0]
    same_bits(start.params, before)
    assert float(next_token_loss(result.model, jnp.asarray(ROWS[:1]))) < losses[0]


def test_same_seed_same_bits_and_another_seed_another_order(start: HookedTransformer) -> None:
    rows = np.random.default_rng(0).integers(0, 7, (12, 6))
    first, again, other = (train(start, rows, config(seed=seed)) for seed in (1, 1, 2))
    same_bits(first.model.params, again.model.params)
    assert first.history == again.history
    assert first.history != other.history


def test_resumed_run_equals_an_uninterrupted_one(start: HookedTransformer, tmp_path: Path) -> None:
    whole = train(start, noisy_batch, config(directory=tmp_path / "whole", save_every=4))

    def interrupted(step: int) -> np.ndarray:
        if step == 6:
            raise KeyboardInterrupt
        return noisy_batch(step)

    options = config(directory=tmp_path / "parts", save_every=4)
    with pytest.raises(KeyboardInterrupt):
        train(start, interrupted, options)
    seen = []
    resumed = train(start, lambda step: seen.append(step) or noisy_batch(step), options, resume=True)
    assert seen == list(range(4, 12))
    same_bits(resumed.model.params, whole.model.params)
    assert resumed.history == whole.history
    left, right = (load_file(tmp_path / name / FILE) for name in ("parts", "whole"))
    same_bits(left, right)


def test_resuming_a_finished_run_returns_it(start: HookedTransformer, tmp_path: Path) -> None:
    options = config(directory=tmp_path)
    done = train(start, noisy_batch, options)
    again = train(start, noisy_batch, options, resume=True)
    same_bits(done.model.params, again.model.params)
    assert done.history == again.history


def test_a_checkpoint_is_neither_overwritten_nor_mistaken(start: HookedTransformer, tmp_path: Path) -> None:
    train(start, noisy_batch, config(directory=tmp_path))
    with pytest.raises(ConfigError, match=r"already holds a checkpoint.*resume=True"):
        train(start, noisy_batch, config(directory=tmp_path))
    with pytest.raises(CheckpointError, match=r"another config \(learning_rate: was 0.02, is 0.5\)"):
        train(start, noisy_batch, config(directory=tmp_path, learning_rate=0.5), resume=True)
    wider = HookedTransformer(start.cfg.replace(d_mlp=12))
    with pytest.raises(CheckpointError, match=r"another model or optimizer: .*should be float32\[12"):
        train(wider, noisy_batch, config(directory=tmp_path), resume=True)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        train(start, noisy_batch, config(directory=tmp_path), resume=True)


def test_weights_choose_what_counts(start: HookedTransformer) -> None:
    tokens = jnp.asarray(ROWS[:2])
    weights = jnp.zeros((2, 5)).at[1, 2].set(3.0)
    per_token = start(tokens, return_type="loss", loss_per_token=True)
    assert float(next_token_loss(start, tokens, weights)) == pytest.approx(float(per_token[1, 2]), rel=1e-6)
    result = train(start, lambda step: (ROWS[:4], np.ones((4, 5))), config())
    plain = train(start, lambda step: ROWS[:4], config())
    assert result.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=1e-4)


def test_hooks_apply_and_are_not_trained(start: HookedTransformer) -> None:
    hooked = start.add_hook("blocks.0.hook_mlp_out", Zero())
    trained = train(hooked, ROWS, config()).model
    for name in ("W_in", "W_out"):
        change = np.abs(np.asarray(trained.params["blocks"][0]["mlp"][name] - start.params["blocks"][0]["mlp"][name]))
        assert change.max() < 5e-3, "only weight decay may move an MLP whose output is zeroed"
    assert np.asarray(trained.params["unembed"]["W_U"] != start.params["unembed"]["W_U"]).any()


def test_weight_decay_spares_biases_and_norms(start: HookedTransformer) -> None:
    def no_gradient(model: HookedTransformer, tokens: jax.Array, weights: jax.Array | None) -> jax.Array:
        return 0.0 * next_token_loss(model, tokens, weights)

    decayed = train(start, ROWS, config(weight_decay=1.0), loss_fn=no_gradient).model.params
    same_bits(decayed["ln_final"], start.params["ln_final"])
    shrunk = np.asarray(decayed["embed"]["W_E"]) / np.asarray(start.params["embed"]["W_E"])
    assert shrunk.max() < 0.95


def test_own_optimizer_and_log_callback(start: HookedTransformer) -> None:
    seen = []
    result = train(
        start, ROWS, config(), optimizer=optax.sgd(0.0), on_log=lambda model, entry: seen.append((model, entry))
    )
    same_bits(result.model.params, start.params)
    assert [entry for _, entry in seen] == list(result.history)


def test_compiles_once_for_all_steps_and_runs(start: HookedTransformer, compilations, tmp_path: Path) -> None:
    train(start, noisy_batch, config())
    compiled = compilations.count
    train(start, noisy_batch, config(seed=5, directory=tmp_path, save_every=4))
    assert compilations.count == compiled


def test_nan_names_its_step(start: HookedTransformer, tmp_path: Path) -> None:
    def poisoned(step: int) -> tuple[np.ndarray, np.ndarray]:
        return ROWS[:4], np.full((4, 5), np.inf if step == 5 else 1.0)

    with pytest.raises(TrainingError, match="loss of step 5 is nan; the step before it had"):
        train(start, poisoned, config(directory=tmp_path, save_every=4))
    with pytest.raises(TrainingError, match="loss of step 5"):
        train(start, poisoned, config(directory=tmp_path, save_every=4), resume=True)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((2, 7), int), r"rows of 7 tokens.*n_ctx=6"),
        (np.zeros((2, 1), int), r"rows of 1 tokens.*at least 2"),
        (np.zeros(5, int), r"integer token ids \[batch, pos\], got int64\[5\]"),
        (np.zeros((0, 5), int), r"got int64\[0, 5\]"),
        (np.zeros((2, 5)), "got float64"),
        (np.full((2, 5), 7), "token id 7; ids run from 0 to 6"),
        (np.full((2, 5), -1), "token id -1"),
        ((np.zeros((2, 5), int), np.ones((2, 5))), r"must be \[batch, pos - 1\] = \[2, 4\]"),
        ((np.zeros((2, 5), int), np.zeros((2, 4))), "not all zero"),
    ],
)
def test_wrong_batches_name_the_step(start: HookedTransformer, batch: object, message: str) -> None:
    with pytest.raises(InputError, match=r"step 0.*" + message):
        train(start, lambda step: batch, config())


def test_wrong_data_sets(start: HookedTransformer) -> None:
    with pytest.raises(InputError, match="cannot be resumed"):
        train(start, iter([ROWS]), config())
    with pytest.raises(InputError, match="batch_size=64 is more than the 16 rows"):
        train(start, ROWS, config(batch_size=64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": -3}, "steps must be a positive integer"),
        ({"steps": 2.5}, "steps=2.5 is not a whole number"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"warmup_steps": 12}, "warmup_steps=12 must be at least 0 and less than steps=12"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"beta2": 1.5}, "beta2 must be between 0 and 1"),
        ({"save_every": 6}, "save_every=6 is not a multiple of log_every=4"),
    ],
)
def test_wrong_configs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_every_row_comes_once_an_epoch() -> None:
    batch = rows_of(np.arange(10)[:, None], 5, seed=0)
    for epoch in range(3):
        seen = np.concatenate([batch(2 * epoch), batch(2 * epoch + 1)])
        assert sorted(seen[:, 0]) == list(range(10))
    assert not np.array_equal(batch(0), batch(2))


def test_progress_line(start: HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    train(start, ROWS, config(steps=4, warmup_steps=0, log_every=2, progress=True))
    shown = capsys.readouterr().err
    assert "2/4  loss" in shown
    assert shown.endswith("\n")
