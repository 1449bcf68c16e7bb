"""Metrics of the logits as a model sees them: what they may say of themselves, their values, and their derivatives.

A metric is any function of logits ``[batch, pos, d_vocab_out]`` that returns one number, or one for each prompt
``[batch]``. Those of :mod:`tljax.patching` need no logits of all positions; the protocols here are how.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.checks import is_traced
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, TljaxError
from tljax.modules.readout import Readout, by_positions
from tljax.numerics import widened
from tljax.processes import fetch
from tljax.text.warned import level_of_caller
from tljax.typing import Params

Metric = Callable[[Any], Any]

UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
"""Errors of functions that need numbers, and were given an array that only stands for them."""
SMALL = 1e-3
"""A metric that is less steep than this may be at an extremum: it is if no more than this share of its slope elsewhere
is left, which is rounding."""


class ZeroGradientWarning(UserWarning):
    """A metric has no slope at this run, so that its gradients say nothing."""


@runtime_checkable
class InText(Protocol):
    """A metric that can count its positions in padded prompts."""

    def in_text(self, attention_mask: Any) -> Any:
        """Returns the same metric for logits of prompts with this padding."""
        ...


@runtime_checkable
class ReadsStream(Protocol):
    """A metric that unembeds what it reads, some positions at a time, so that the logits of all need not be there."""

    @property
    def reads_stream(self) -> bool:
        """Whether it can, with what it holds."""
        ...

    def of_stream(self, cfg: HookedTransformerConfig, params: Params, residual: jax.Array) -> Any:
        """Returns its value on a run with this final residual stream ``[batch, pos, d_model]``."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfStream:
    """A metric as a function of the final residual stream ``[batch, pos, d_model]``."""

    metric: ReadsStream
    readout: Readout

    def __call__(self, residual: jax.Array) -> Any:
        return self.metric.of_stream(self.readout.module.cfg, self.readout.params, residual)

    def logits_are_finite(self, residual: jax.Array) -> jax.Array:
        """Returns whether all logits of the stream are finite."""
        return by_positions(_finite, self.readout, residual).all()


def _finite(readout: Readout, stream: jax.Array) -> jax.Array:
    return jnp.isfinite(readout.logits(stream)).all(axis=-1)


def metrics_by_name(metric: Any) -> tuple[dict[str, Metric], bool]:
    """Returns metrics by name, and whether several were given by name; one alone is called ``""``.

    Raises:
        InputError: one is not a function, or there are none.
    """
    several = isinstance(metric, Mapping)
    metrics = dict(metric) if several else {"": metric}
    if not metrics:
        raise InputError("metric={} holds no metric: give a function of the logits, or several by name.")
    for one in metrics.values():
        check_metric(one)
    return metrics, several


def check_metric(metric: Any) -> None:
    """Raises InputError if a metric is not a function."""
    if not callable(metric):
        raise InputError(f"A metric is a function of the logits, such as LogitDiff(answer, wrong); got {metric!r}.")


def is_pytree(metric: Any) -> bool:
    """Whether a metric is a pytree of arrays and numbers."""
    if jax.tree_util.all_leaves([metric]):
        return False
    kinds = jax.Array | np.ndarray | np.generic | bool | int | float
    return all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(metric))


def as_numbers(value: Any, batch: int) -> jax.Array:
    """Converts what a metric returned to floats.

    Raises:
        InputError: ``value`` is neither a number nor one number a prompt.
    """
    wanted = "A metric returns one number, or one for each prompt [batch]"
    if value is None or isinstance(value, list | tuple | dict | str):
        raise InputError(f"The metric returned {value!r}. {wanted}: return the number.")
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"The metric returned a {type(value).__name__}. {wanted}: return the number.") from error
    if array.shape not in ((), (batch,)):
        raise InputError(
            f"The metric returned an array of shape {array.shape} for {batch} prompts. {wanted}: index the position "
            "and the token, or average."
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise InputError(f"The metric returned complex numbers. {wanted}: take the real part or the magnitude.")
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)


def read_padding(position: int, prompt: int, tokens: int) -> InputError:
    """Returns the error for a metric that reads a position where a prompt has padding."""
    return InputError(
        f"The metric reads position {position} of prompt {prompt}, where there is padding: that prompt has {tokens} "
        "tokens. LogitDiff and the other metrics of tljax.patching count positions in each prompt's text; a function "
        "indexes the whole array, so give it the places: logits[np.arange(batch), last]."
    )


def differentiable(metric: Metric, logits: Any) -> jax.Array:
    """Evaluates a metric where something differentiates it.

    Returns:
        Its value, a number or ``[batch]``.

    Raises:
        InputError: it returns something else, or a constant; or it needs concrete numbers.
    """
    try:
        value = metric(logits)
    except UNTRACEABLE as error:
        raise InputError(
            "The metric took numbers out of the logits (float(), int(), .item(), np.asarray, an if), and then nothing "
            "can be differentiated. Compute with jnp on the logits and return the array: convert the value that comes "
            "back instead."
        ) from error
    except TljaxError:
        raise
    except Exception as error:
        error.add_note("(raised in the metric)")
        raise
    numbers = as_numbers(value, len(logits))
    if not isinstance(value, Tracer):
        raise InputError(
            f"The metric returned {value!r}, in which no logit has a part that can be differentiated: its gradient "
            "would be zero everywhere. Counts, argmax, ==, round and stop_gradient have none: take LogitDiff, LogProb "
            "or a probability instead."
        )
    return numbers


def _slope(metric: Metric, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, pull = jax.vjp(functools.partial(differentiable, metric), logits)
    return value, pull(jnp.ones_like(value))[0]


_slope_compiled = jax.jit(_slope)


def slope(metric: Metric, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a metric's value, a number or ``[batch]``, and the gradient of its sum with respect to the logits.

    A pytree is compiled with itself as an argument; any other function runs operation by operation, so that a new one
    compiles nothing new.

    Raises:
        InputError: see :func:`differentiable`.
    """
    if is_pytree(metric):
        try:
            # once with its own numbers, which are checked, and once as compilation sees it
            jax.eval_shape(functools.partial(differentiable, metric), logits)
            return _slope_compiled(metric, logits)
        except InputError as error:
            if not isinstance(error.__cause__, UNTRACEABLE):
                raise  # else it needs its own numbers, which it has where nothing is compiled
    return _slope(metric, logits)


def check_slope(metric: Metric, name: str, end: jax.Array, found: jax.Array, text: Any) -> None:
    """Checks the gradient of a metric with respect to what it takes, unless it is traced.

    Args:
        metric: the metric.
        name: what it is called, if there are several.
        end: what it was evaluated on: logits, or the final residual stream ``[batch, pos, ...]``.
        found: its gradient, of the same shape.
        text: ``[batch, pos]``, ``False`` at padding; ``None`` if there is none.

    Raises:
        InputError: the gradient is not finite; or it is of padding.

    Warns:
        ZeroGradientWarning: it is zero, or so small against the slope elsewhere that it is rounding.
    """
    if is_traced(found, text):
        return
    called = f"The metric {name!r}" if name else "The metric"
    finite, steepness, by_position = fetch(_summary(found))
    if not finite:
        whole = bool(metric.logits_are_finite(end) if isinstance(metric, OfStream) else jnp.isfinite(end).all())
        reason = (
            "though the logits are finite. Where it takes a logarithm, a root or a quotient of zero, give it a floor "
            "(jnp.where before the logarithm, not after; jax.nn.log_softmax instead of log(softmax))"
            if whole else
            "as some logits are not. Look for where they come from with run_with_cache, or run the model in float32"
        )  # fmt: skip
        raise InputError(f"{called} has a gradient that is not finite, {reason}.")
    if text is not None and (read := np.argwhere((by_position > 0) & ~np.asarray(text))).size:
        prompt, position = map(int, read[0])
        raise read_padding(position, prompt, int(np.asarray(text)[prompt].sum()))
    if steepness < SMALL and steepness <= SMALL * float(_summary(slope(metric, _elsewhere(end))[1])[1]):
        warnings.warn(
            f"{called} does not change to first order at this run (its slope is {steepness:.1g}), so "
            "gradients of it say nothing: it compares the run with itself, as KL(base) does at the base, or is flat "
            "there. Take LogitDiff, or differentiate at the other run (the corrupted one).",
            ZeroGradientWarning,
            stacklevel=level_of_caller(),
        )


@jax.jit
def _summary(found: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns whether a gradient is finite, how steep the metric is over all positions of a prompt, and where."""
    sizes = jnp.abs(found.astype(widened(found.dtype))).max(axis=-1)
    return jnp.isfinite(sizes).all(), sizes.sum(axis=-1).max(), sizes


@jax.jit
def _elsewhere(end: jax.Array) -> jax.Array:
    """Returns other logits, or another stream, of about the same size."""
    wave = jnp.sin(jnp.arange(end.shape[-1], dtype=jnp.float32)).astype(end.dtype)
    spread = 0.1 * jnp.maximum(end.std(axis=-1, keepdims=True), 1)
    return 0.9 * end + spread.astype(end.dtype) * jnp.broadcast_to(wave, end.shape)
