"""One training step, compiled: the loss and its gradients, Adam, what is dead, what a batch kept."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tljax.dictionaries.training.coefficients import Numbers, coefficients_at, learning_rate_at
from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.gradients import BatchLoss, loss_and_gradients
from tljax.dictionaries.training.preparation import Preparation
from tljax.dictionaries.training.rows import column_sums, square_sum
from tljax.dictionaries.training.selection import Cut

Metrics = dict[str, jax.Array]

_MEMBER = "member"
_TINY = 1e-12
_COEFFICIENTS = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}


class TrainingState(NamedTuple):
    """Everything that a step reads and changes; in a stack every leaf has a leading axis of members.

    Attributes:
        params: the parameters, in units of training; matrices of crosscoders with sources merged.
        optimizer: the optimizer's state.
        step: steps done.
        quiet: steps since each feature fired, int32 ``[d_sae]``.
        fired: tokens in which each feature fired, since the sampling window began, ``[d_sae]``.
        tokens: tokens seen since then.
        threshold: the threshold of ``batchtopk``, an average over steps; 0 for others.
        latest: the threshold of the latest batch, from which the search for the next one starts.
    """

    params: dict[str, jax.Array]
    optimizer: Any
    step: jax.Array
    quiet: jax.Array
    fired: jax.Array
    tokens: jax.Array
    threshold: jax.Array
    latest: jax.Array


def adam(cfg: TrainingConfig, numbers: Numbers) -> optax.GradientTransformation:
    """Returns Adam without a learning rate; its numbers are data."""
    return optax.scale_by_adam(numbers["adam_beta1"], numbers["adam_beta2"], numbers["adam_eps"])  # pyright: ignore[reportArgumentType]


def initial_state(
    params: dict[str, jax.Array], cfg: TrainingConfig, optimizer: optax.GradientTransformation | None
) -> TrainingState:
    """Returns the state before the first step."""
    chosen = optax.scale_by_adam() if optimizer is None else optimizer
    zero = jnp.zeros(())
    return TrainingState(
        dict(params), chosen.init(params), jnp.int32(0),
        jnp.zeros(cfg.d_sae, jnp.int32), jnp.zeros(cfg.d_sae), zero, zero, zero,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("cfg", "optimizer"), donate_argnames=("state",))
def train_step(
    state: TrainingState,
    x: jax.Array,
    y: jax.Array | None,
    numbers: Numbers,
    preparation: Preparation,
    cfg: TrainingConfig,
    optimizer: optax.GradientTransformation | None,
) -> tuple[TrainingState, Metrics]:
    """One step of one dictionary.

    Args:
        state: the state before; its memory is reused.
        x: what is encoded, ``[tokens, d_in]``.
        y: what is reconstructed; ``None`` for the same.
        numbers: the numbers of the run.
        preparation: what is done to activations first.
        cfg: what the program is compiled for.
        optimizer: used instead of Adam.

    Returns:
        The state after, and what the step measured.
    """
    with jax.default_matmul_precision(cfg.precision):
        inputs = preparation.apply(x, y)
        return _step(state, *inputs, numbers, cfg, optimizer, None)


@functools.partial(jax.jit, static_argnames=("cfg", "optimizer", "at_once"), donate_argnames=("state",))
def train_step_of_stack(
    state: TrainingState,
    x: jax.Array,
    y: jax.Array | None,
    numbers: Numbers,
    preparation: Preparation,
    cfg: TrainingConfig,
    optimizer: optax.GradientTransformation | None,
    at_once: int,
) -> tuple[TrainingState, Metrics]:
    """One step of a stack of dictionaries on the same batch, ``at_once`` members mapped over at a time."""

    def one(member: tuple[TrainingState, Numbers]) -> tuple[TrainingState, Metrics]:
        return _step(member[0], *inputs, member[1], cfg, optimizer, _MEMBER)

    with jax.default_matmul_precision(cfg.precision):
        inputs = preparation.apply(x, y)
        several = jax.vmap(one, axis_name=_MEMBER)
        members = state.step.shape[0]
        if at_once == 1:
            return jax.lax.map(
                lambda member: _step(member[0], *inputs, member[1], cfg, optimizer, None), (state, numbers)
            )
        if at_once >= members:
            return several((state, numbers))
        grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, at_once, *leaf.shape[1:]), (state, numbers))
        result = jax.lax.map(several, grouped)
        return jax.tree.map(lambda leaf: leaf.reshape(members, *leaf.shape[2:]), result)


def members_at_once(members: int) -> int:
    """Returns how many members of a stack are mapped over at a time.

    On a CPU they run one after another inside the program: side by side four of them take 4 to 5 times as long as one,
    in turns 2.4 to 3.9 times [measured, widths 32 to 256, 128 to 2,048 features].
    """
    return 1 if jax.default_backend() == "cpu" else members


def _step(
    state: TrainingState,
    x: jax.Array,
    y: jax.Array,
    numbers: Numbers,
    cfg: TrainingConfig,
    optimizer: optax.GradientTransformation | None,
    axis_name: str | None,
) -> tuple[TrainingState, Metrics]:
    now = coefficients_at(numbers, state.step)
    dead = state.quiet > numbers["dead_feature_window"].astype(jnp.int32)
    grads, loss = loss_and_gradients(state.params, x, y, now, dead, cfg, state.latest, axis_name)
    after, rate, norm = advance(state, grads, loss.outcome.fired, loss.cut, x.shape[0], now, cfg, optimizer)
    return after, _metrics(after, loss, x, y, now, rate, norm, dead, cfg)


def advance(
    state: TrainingState,
    grads: dict[str, jax.Array],
    fired: jax.Array,
    cut: Cut | None,
    tokens: jax.Array | int,
    numbers: Numbers,
    cfg: TrainingConfig,
    optimizer: optax.GradientTransformation | None,
) -> tuple[TrainingState, jax.Array, jax.Array]:
    """Returns the state after a step, the learning rate, and the norm of the gradient.

    Args:
        state: the state before.
        grads: the gradient of the loss, by parameter.
        fired: in how many tokens each feature fired, ``[d_sae]``.
        cut: the selection of the batch, of ``batchtopk``.
        tokens: number of tokens in the batch.
        numbers: the numbers of the run at this step.
        cfg: what the program is compiled for.
        optimizer: used instead of Adam.
    """
    rate = learning_rate_at(numbers, state.step, cfg.lr_schedule)
    params, moments, norm = _update(state, grads, numbers, rate, cfg, optimizer)
    threshold, latest = state.threshold, state.latest
    if cut is not None:
        found = jnp.isfinite(cut.value)
        follow = numbers["topk_threshold_lr"]
        threshold = jnp.where(found, (1 - follow) * threshold + follow * cut.value, threshold)
        latest = jnp.where(found, cut.value, latest)
    begins = state.step % numbers["feature_sampling_window"].astype(jnp.int32) == 0
    after = TrainingState(
        params, moments, state.step + 1,
        jnp.where(fired > 0, 0, state.quiet + 1),
        jnp.where(begins, 0, state.fired) + fired,
        jnp.where(begins, 0, state.tokens) + tokens,
        threshold, latest,
    )  # fmt: skip
    return after, rate, norm


def _metrics(
    after: TrainingState, loss: BatchLoss, x: jax.Array, y: jax.Array, now: Numbers, rate: jax.Array, norm: jax.Array,
    dead: jax.Array, cfg: TrainingConfig,
) -> Metrics:  # fmt: skip
    tokens = x.shape[0]
    centred = y - (column_sums(y) / tokens)[None]
    metrics = {"loss": loss.total, **loss.outcome.terms}
    metrics["l0"] = loss.outcome.fired.sum() / tokens
    metrics["explained_variance"] = 1 - loss.outcome.error / square_sum(centred)
    metrics["bad_inputs"] = (~jnp.isfinite(x)).sum(dtype=jnp.int32).astype(jnp.float32)
    if y is not x:
        metrics["bad_inputs"] += (~jnp.isfinite(y)).sum(dtype=jnp.int32).astype(jnp.float32)
    return metrics | measures_of_update(after, now, rate, norm, dead, cfg)


def measures_of_update(
    after: TrainingState, now: Numbers, rate: jax.Array, norm: jax.Array, dead: jax.Array, cfg: TrainingConfig
) -> Metrics:
    """Returns what every kind of step measures of itself: dead features, rate, norm, coefficient and threshold.

    Args:
        after: the state after the step.
        now: the numbers of the run at the step.
        rate, norm: the learning rate, and the norm of the gradient.
        dead: mask of dead features.
        cfg: the structure of the settings.
    """
    metrics: Metrics = {"dead_features": dead.sum(dtype=jnp.int32).astype(jnp.float32), "lr": rate, "grad_norm": norm}
    if (name := _COEFFICIENTS.get(cfg.architecture)) is not None:
        metrics[name] = now[name]
    if cfg.architecture == "batchtopk":
        metrics["topk_threshold"] = after.threshold
    return metrics


def _update(
    state: TrainingState, grads: dict[str, jax.Array], now: Numbers, rate: jax.Array, cfg: TrainingConfig,
    optimizer: optax.GradientTransformation | None,
) -> tuple[dict[str, jax.Array], Any, jax.Array]:  # fmt: skip
    """Returns parameters and moments after the step, and the norm of the gradient."""
    W_dec = state.params["W_dec"]
    if cfg.decoder_norm == "unit":
        grads = {**grads, "W_dec": _across(grads["W_dec"], W_dec)}
    norm = jnp.sqrt(jnp.stack([square_sum(one) for one in grads.values()]).sum())
    if optimizer is None and cfg.clip is not None:
        factor = jnp.minimum(now["clip"] / jnp.maximum(norm, _TINY), 1)
        grads = {name: one * factor for name, one in grads.items()}
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of its integer step count
        chosen = adam(cfg, now) if optimizer is None else optimizer
        updates, moments = chosen.update(grads, state.optimizer, state.params)
        if optimizer is None:
            updates = {name: -rate * one for name, one in updates.items()}  # pyright: ignore
        params: Any = optax.apply_updates(state.params, updates)
    if cfg.decoder_norm == "unit":
        rows = params["W_dec"]
        params["W_dec"] = rows / jnp.maximum(jnp.sqrt((rows**2).sum(axis=-1, keepdims=True)), _TINY)
    if "threshold" in params:
        params["threshold"] = jnp.maximum(params["threshold"], 0)
    return params, moments, norm


def _across(gradient: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the gradient without its part along each row."""
    squares = jnp.maximum((rows**2).sum(axis=-1, keepdims=True), _TINY)
    return gradient - (gradient * rows).sum(axis=-1, keepdims=True) / squares * rows
