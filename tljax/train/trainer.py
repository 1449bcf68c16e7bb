"""``train``: fit a model to batches with AdamW, warmup and cosine decay, resumable to the bit."""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax
from jaxtyping import Array, Float

from tljax import checks
from tljax.dictionary_params import without_dictionaries
from tljax.errors import ConfigError
from tljax.errors import TrainingError as TrainingError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.quantized_weight import refuse_quantized
from tljax.train.batches import Batch, batch_function, check_batch
from tljax.train.checkpoint import FILE, load_state, save_state
from tljax.typing import Params

LossFunction = Callable[[HookedTransformer, jax.Array, jax.Array | None], jax.Array]

_MAY_CHANGE = ("log_every", "save_every", "directory", "progress")
_RUN_ONLY = {"log_every": 1, "save_every": None, "directory": None, "progress": False, "batch_size": 1, "seed": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        steps: optimizer steps.
        batch_size: rows a step when the data is an array of rows; a batch function decides for itself.
        learning_rate: the highest, reached after ``warmup_steps``; from there it falls along a cosine.
        warmup_steps: steps of linear increase from zero.
        final_fraction: learning rate at the last step, as a fraction of the highest.
        weight_decay: AdamW's, on matrices only (``W_*``), not on biases and norms.
        beta1, beta2: AdamW's averaging of gradients and of their squares.
        clip: largest global norm of the gradient; ``None`` does not clip.
        seed: seed of the order of rows when the data is an array of rows.
        log_every: steps between entries of the history. The loss is checked for NaN there, step by step.
        save_every: steps between checkpoints, a multiple of ``log_every``; ``None`` saves only at the end.
        directory: where the checkpoint goes; ``None`` saves nothing.
        progress: write a progress line to stderr.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    final_fraction: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float | None = 1.0
    seed: int = 0
    log_every: int = 50
    save_every: int | None = None
    directory: str | os.PathLike[str] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        checks.check_fields(self, ConfigError)
        for name in ("steps", "batch_size", "log_every", "save_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | np.integer) or value < 1):
                raise ConfigError(f"{name} must be a positive integer, got {value!r}.")
        if self.save_every is not None and self.save_every % self.log_every:
            raise ConfigError(
                f"save_every={self.save_every} is not a multiple of log_every={self.log_every}: checkpoints are "
                "written where the loss has just been checked."
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(f"warmup_steps={self.warmup_steps} must be at least 0 and less than steps={self.steps}.")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise ConfigError(f"{name} must be positive, got {value!r}.")
        for name in ("final_fraction", "weight_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}.")

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer these fields describe."""
        schedule = optax.schedules.warmup_cosine_decay_schedule(
            0.0 if self.warmup_steps else self.learning_rate,
            self.learning_rate,
            self.warmup_steps,
            self.steps,
            self.final_fraction * self.learning_rate,
        )
        adamw = optax.adamw(schedule, self.beta1, self.beta2, weight_decay=self.weight_decay, mask=_is_matrix)
        return adamw if self.clip is None else optax.chain(optax.clip_by_global_norm(self.clip), adamw)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of training.

    Attributes:
        model: the trained model.
        history: one entry every ``log_every`` steps: ``step`` (steps done), ``loss`` (mean since the last entry).
    """

    model: HookedTransformer
    history: tuple[dict[str, float], ...]


def _is_matrix(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.startswith("W_"), params)


def next_token_loss(model: HookedTransformer, tokens: jax.Array, weights: jax.Array | None = None) -> Float[Array, ""]:
    """Computes the mean cross entropy of the next token, in nats.

    Args:
        model: the model.
        tokens: ids, ``[batch, pos]``.
        weights: ``[batch, pos - 1]``, how much each predicted token counts; ``None`` counts all alike.
    """
    losses = model(tokens, return_type="loss", loss_per_token=True)
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def train(
    model: HookedTransformer,
    batches: Callable[[int], Batch] | np.ndarray,
    config: TrainConfig,
    *,
    loss_fn: LossFunction = next_token_loss,
    optimizer: optax.GradientTransformation | None = None,
    resume: bool = False,
    on_log: Callable[[HookedTransformer, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Trains a model's parameters; hooks that the model carries apply, and are not trained.

    Compiles one program for each shape of batch; a second run with the same config and loss compiles nothing.

    Args:
        model: the model to start from; it does not change.
        batches: a function from the step (0, 1, …) to a batch, or all rows, ids ``[rows, pos]``. A batch is ids
            ``[batch, pos]`` or ``(ids, weights [batch, pos - 1])``. Because a batch depends on its step alone, an
            interrupted run goes on exactly as it would have.
        config: how to train.
        loss_fn: ``(model, tokens, weights) -> scalar`` to minimise.
        optimizer: used instead of ``config.optimizer()``.
        resume: go on from the checkpoint in ``config.directory`` if there is one. The result has the same bits as
            that of an uninterrupted run.
        on_log: called with the current model and each new entry of the history.

    Returns:
        The trained model and the history of the loss.

    Raises:
        InputError: a batch has a wrong shape, or an id out of range.
        ConfigError: ``config.directory`` holds a checkpoint and ``resume`` is off.
        CheckpointError: the checkpoint is damaged or belongs to another run.
        TrainingError: the loss stopped being a finite number; names the step.
        QuantizationError: weights are quantised.

    >>> from tljax import HookedTransformerConfig
    >>> cfg = HookedTransformerConfig(d_model=8, n_heads=2, n_layers=1, n_ctx=4, d_vocab=4, act_fn="gelu")
    >>> rows = np.tile([0, 1, 2, 3], (8, 1))
    >>> config = TrainConfig(steps=20, batch_size=4, learning_rate=0.03, log_every=10, progress=False)
    >>> first, last = train(HookedTransformer(cfg), rows, config).history
    >>> last["loss"] < first["loss"]
    True
    """
    refuse_quantized(without_dictionaries(model.params), "Training needs derivatives with respect to weights")
    get_batch = batch_function(batches, config.batch_size, config.seed)
    if optimizer is None:
        optimizer = _optimizer_of(dataclasses.replace(config, **_RUN_ONLY))
    state, start, history = _begin(model, optimizer, config, resume)
    losses: list[jax.Array] = []
    began = time.perf_counter()
    for step in range(start, config.steps):
        tokens, weights = check_batch(get_batch(step), model.cfg, step)
        state, loss = _step(state, model, tokens, weights, optimizer, loss_fn)
        losses.append(loss)
        done = step + 1
        if done % config.log_every and done < config.steps:
            continue
        history.append({"step": done, "loss": _mean_loss(losses, done)})
        losses.clear()
        if config.progress:
            _show(done, config.steps, history[-1]["loss"], (time.perf_counter() - began) / (done - start))
        if on_log is not None:
            on_log(model.replace(params=state[0]), history[-1])
        is_due = done == config.steps or (config.save_every and not done % config.save_every)
        if config.directory is not None and is_due:
            save_state(Path(config.directory), state, done, history, _identity(config), model.cfg)
    return TrainResult(model=model.replace(params=state[0]), history=tuple(history))


@functools.lru_cache(maxsize=8)
def _optimizer_of(config: TrainConfig) -> optax.GradientTransformation:
    """Returns the same object for the same fields, so that a second run with them compiles nothing."""
    return config.optimizer()


@functools.partial(jax.jit, static_argnames=("optimizer", "loss_fn"))
def _step(
    state: tuple[Params, Any],
    model: HookedTransformer,
    tokens: jax.Array,
    weights: jax.Array | None,
    optimizer: optax.GradientTransformation,
    loss_fn: LossFunction,
) -> tuple[tuple[Params, Any], jax.Array]:
    """One optimizer step: returns the new (parameters, optimizer state) and the loss before it."""
    params, optimizer_state = state
    loss, gradient = jax.value_and_grad(lambda p: loss_fn(model.replace(params=p), tokens, weights))(params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of its integer step count
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = cast(Params, optax.apply_updates(params, updates))
    return (params, optimizer_state), loss


def _begin(
    model: HookedTransformer, optimizer: optax.GradientTransformation, config: TrainConfig, resume: bool
) -> tuple[tuple[Params, Any], int, list[dict[str, float]]]:
    """Returns the state to start from, the number of steps already done, and their history."""
    state = (model.params, jax.jit(optimizer.init)(model.params))
    if config.directory is None or not (Path(config.directory) / FILE).is_file():
        return state, 0, []
    if not resume:
        raise ConfigError(
            f"{config.directory} already holds a checkpoint. Pass resume=True to go on from it, or another directory."
        )
    return load_state(Path(config.directory), state, _identity(config), model.cfg)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """Returns the config fields that affect the result."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in _MAY_CHANGE}


def _mean_loss(losses: list[jax.Array], done: int) -> float:
    values = np.asarray(jax.device_get(losses), np.float64)
    if not np.isfinite(values).all():
        first = int(np.argmin(np.isfinite(values)))
        step = done - len(values) + first
        before = f"; the step before it had {values[first - 1]:.4g}" if first else ""
        raise TrainingError(
            f"The loss of step {step} is {values[first]}{before}. Lower learning_rate, lengthen warmup_steps, or "
            "set clip; a checkpoint written before that step is still good."
        )
    return float(values.mean())


def _show(done: int, steps: int, loss: float, seconds: float) -> None:
    """Rewrites the progress line."""
    filled = 24 * done // steps
    bar = "=" * filled + " " * (24 - filled)
    left = seconds * (steps - done)
    line = f"[{bar}] {done}/{steps}  loss {loss:.4f}  {1000 * seconds:.0f} ms/step  {left:.0f} s left "
    print(line, end="\n" if done == steps else "\r", file=sys.stderr, flush=True)
