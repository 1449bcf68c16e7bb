"""Linear probes on activations: ridge regression, logistic regression, and logistic regression on a few neurons.

Inputs are activations ``[..., feature]`` with one target for each; leading axes (batch, position) are examples. The
caller holds out test examples: fit on some, call :meth:`LinearProbe.evaluate` on others.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float

from tljax.checks import check_type, typed, whole
from tljax.errors import InputError

METHODS = ("mean_difference", "l1")
_PENALTIES = 60  # steps of the L1 path
_SMALLEST_PENALTY = 1e-3  # relative to the penalty at which every weight is zero
_L1_STEPS = 200


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A fitted probe, which predicts ``activations @ weights + bias``; a pytree.

    Attributes:
        weights: ``[feature]`` (``[feature, output]`` for several ridge targets), in the activations' own units: the
            probe's direction.
        bias: scalar or ``[output]``.
        neurons: for a sparse probe, the ``k`` features it reads, most important first; ``None`` otherwise.
        is_classifier: whether outputs are log odds of label 1.
    """

    weights: jax.Array
    bias: jax.Array
    neurons: jax.Array | None = None
    is_classifier: bool = dataclasses.field(default=True, metadata={"static": True})

    def __call__(self, activations: Any) -> jax.Array:
        """Returns log odds, or predicted values, ``[...]`` for activations ``[..., feature]``."""
        features = jnp.asarray(activations).astype(self.weights.dtype)
        if features.shape[-1] != self.weights.shape[0]:
            raise InputError(
                f"This probe reads {self.weights.shape[0]} features; got activations of shape {features.shape}."
            )
        outputs = jnp.matmul(features, self.weights, precision="highest")
        return outputs + jnp.broadcast_to(self.bias, outputs.shape)

    def evaluate(self, activations: Any, targets: Any) -> dict[str, float]:
        """Scores the probe, normally on examples that it was not fitted on.

        Returns:
            For a classifier, ``accuracy``, ``balanced_accuracy`` (mean over the two labels), ``f1``, ``auc`` (how often
            an example of label 1 gets larger odds than one of label 0) and ``loss`` in nats. For a regression, ``r2``
            and ``mse``.
        """
        features, values = _examples(activations, targets, self.is_classifier)
        outputs = np.asarray(self(features), np.float64)
        if self.is_classifier:
            return _classification(outputs, np.asarray(values) > 0.5)
        wanted = np.asarray(values, np.float64)
        error = float(np.mean((outputs - wanted) ** 2))
        spread = float(np.mean((wanted - wanted.mean(axis=0)) ** 2))
        return {"r2": 1 - error / spread if spread else float("nan"), "mse": error}


def ridge_probe(activations: Any, targets: Any, l2: float = 1.0) -> LinearProbe:
    """Fits least squares with a penalty ``l2 * |weights|^2``, in closed form; the bias is not penalised.

    Args:
        activations: ``[..., feature]``.
        targets: ``[...]``, or ``[..., output]`` for several at once.
        l2: the penalty, 0 or more.

    Raises:
        InputError: shapes that do not fit, numbers that are not finite, a negative penalty.
    """
    features, values = _examples(activations, targets, False)
    _check_penalty(l2)
    weights, bias = _ridge(features, values, l2)
    return LinearProbe(weights=weights, bias=bias, is_classifier=False)


@typed
def logistic_probe(activations: Any, labels: Any, l2: float = 1e-2, max_steps: int = 200) -> LinearProbe:
    """Fits a logistic regression: mean cross entropy plus ``l2 / 2 * |weights|^2``, on standardised features.

    Args:
        activations: ``[..., feature]``.
        labels: ``[...]``, 0 or 1.
        l2: the penalty, 0 or more; with 0, linearly separable labels have no optimum.
        max_steps: largest number of steps of L-BFGS; it stops when the gradient is below 1e-5.

    Raises:
        InputError: labels other than 0 and 1, or only one of them; as for :func:`ridge_probe` otherwise.
    """
    features, values = _examples(activations, labels, True)
    _check_penalty(l2)
    whole(max_steps, "max_steps", at_least=1)
    weights, bias = _logistic(features, values, l2, max_steps)
    return LinearProbe(weights=weights, bias=bias)


@typed
def sparse_probe(
    activations: Any, labels: Any, k: int, method: str = "mean_difference", l2: float = 1e-2, max_steps: int = 200
) -> LinearProbe:
    """Chooses ``k`` neurons, then fits a logistic probe on these alone (Gurnee et al. 2023).

    Args:
        activations: ``[..., feature]``.
        labels: ``[...]``, 0 or 1.
        k: how many features to keep.
        method: ``"mean_difference"``: those whose standardised means differ most between the labels. ``"l1"``: those
            that keep a weight longest as an L1 penalty grows.
        l2: the penalty of the second fit.
        max_steps: largest number of steps of the second fit.

    Returns:
        A probe with ``neurons`` ``[k]``, zero weights elsewhere.

    Raises:
        InputError: ``k`` or ``method`` out of range; as for :func:`logistic_probe` otherwise.
    """
    features, values = _examples(activations, labels, True)
    _check_penalty(l2)
    whole(max_steps, "max_steps", at_least=1)
    if not 1 <= whole(k, "k") <= features.shape[1]:
        raise InputError(f"k={k} is out of range: there are {features.shape[1]} features.")
    if method not in METHODS:
        raise InputError(f"method is one of {', '.join(map(repr, METHODS))}; got {method!r}.")
    importance = _mean_difference(features, values) if method == "mean_difference" else _l1_path(features, values)
    neurons = jnp.argsort(-importance)[:k]
    own, bias = _logistic(features[:, neurons], values, l2, max_steps)
    weights = jnp.zeros(features.shape[1], own.dtype).at[neurons].set(own)
    return LinearProbe(weights=weights, bias=bias, neurons=neurons)


@jax.jit
def _ridge(features: Float[Array, "n d"], targets: Array, l2: Any) -> tuple[jax.Array, jax.Array]:
    mean, centre = features.mean(axis=0), targets.mean(axis=0)
    x, y = features - mean[None], targets - centre[None]
    many, few = x.shape
    if many >= few:
        gram = jnp.matmul(x.T, x, precision="highest") + l2 * jnp.eye(few)
        weights = _solve(gram, jnp.matmul(x.T, y, precision="highest"))
    else:
        gram = jnp.matmul(x, x.T, precision="highest") + l2 * jnp.eye(many)
        weights = jnp.matmul(x.T, _solve(gram, y), precision="highest")
    return weights, centre - jnp.matmul(mean, weights, precision="highest")


def _solve(gram: jax.Array, right: jax.Array) -> jax.Array:
    values, vectors = jnp.linalg.eigh(gram)
    kept = values > values[-1] * gram.shape[0] * jnp.finfo(gram.dtype).eps
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    rotated = jnp.matmul(vectors.T, right, precision="highest")
    return jnp.matmul(vectors, inverse.reshape(-1, *[1] * (right.ndim - 1)) * rotated, precision="highest")


@functools.partial(jax.jit, static_argnames="max_steps")
def _logistic(
    features: Float[Array, "n d"], labels: Float[Array, " n"], l2: Any, max_steps: int
) -> tuple[jax.Array, jax.Array]:
    x, mean, scale = _standardised(features)

    def loss(fitted: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _cross_entropy(fitted, x, labels) + l2 / 2 * jnp.sum(fitted[0] ** 2)

    weights, bias = _minimise(loss, _start(x, labels), max_steps)
    return weights / scale, bias - jnp.sum(mean * weights / scale)


def _minimise(loss: Any, start: Any, max_steps: int) -> Any:
    """Runs L-BFGS until the gradient is small, or for ``max_steps``."""
    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        fitted, state, count, _ = carry
        value, gradient = value_and_grad(fitted, state=state)
        updates, state = solver.update(gradient, state, fitted, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(fitted, updates), state, count + 1, optax.tree.norm(gradient)

    def unfinished(carry: Any) -> Any:
        return (carry[2] < max_steps) & (carry[3] > 1e-5)

    return jax.lax.while_loop(unfinished, step, (start, solver.init(start), 0, jnp.inf))[0]


def _start(x: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    share = labels.mean()
    return jnp.zeros(x.shape[1], x.dtype), jnp.log(share / (1 - share))


def _cross_entropy(fitted: tuple[jax.Array, jax.Array], x: jax.Array, labels: jax.Array) -> jax.Array:
    odds = jnp.matmul(x, fitted[0], precision="highest") + fitted[1]
    return jnp.mean(jax.nn.softplus(odds) - labels * odds)


def _standardised(features: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean, spread = features.mean(axis=0), features.std(axis=0)
    scale = jnp.where(spread > 1e-6 * jnp.abs(mean), spread, jnp.inf)  # a constant feature says nothing
    return (features - mean[None]) / scale[None], mean, scale


@jax.jit
def _mean_difference(features: jax.Array, labels: jax.Array) -> Float[Array, " d"]:
    x, _, _ = _standardised(features)
    ones = jnp.einsum("nd,n->d", x, labels, precision="highest") / labels.sum()
    zeros = jnp.einsum("nd,n->d", x, 1 - labels, precision="highest") / (1 - labels).sum()
    return jnp.abs(ones - zeros)


@jax.jit
def _l1_path(features: jax.Array, labels: jax.Array) -> Float[Array, " d"]:
    """Scores features by the largest L1 penalty at which they have a weight; the larger weight breaks ties."""
    x, _, _ = _standardised(features)
    gradient_of = jax.grad(_cross_entropy)
    largest = jnp.abs(gradient_of(_start(x, labels), x, labels)[0]).max()
    curvature = jnp.linalg.norm(jnp.matmul(x.T, x, precision="highest") / x.shape[0], ord=2) / 4 + 0.25
    rate = 1 / curvature

    def shrink(weights: jax.Array, by: jax.Array) -> jax.Array:
        return jnp.sign(weights) * jnp.maximum(jnp.abs(weights) - by, 0)

    def one_penalty(carry: Any, penalty: jax.Array) -> Any:
        def step(_: Any, state: Any) -> Any:
            fitted, previous, momentum = state
            later = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
            ahead = jax.tree.map(lambda now, before: now + (momentum - 1) / later * (now - before), fitted, previous)
            gradient = gradient_of(ahead, x, labels)
            new = (shrink(ahead[0] - rate * gradient[0], rate * penalty), ahead[1] - rate * gradient[1])
            return new, fitted, later

        fitted, first_seen = carry
        fitted, _, _ = jax.lax.fori_loop(0, _L1_STEPS, step, (fitted, fitted, jnp.ones(())))
        seen = jnp.where((first_seen == 0) & (fitted[0] != 0), penalty, first_seen)
        return (fitted, seen), None

    penalties = largest * jnp.geomspace(1.0, _SMALLEST_PENALTY, _PENALTIES)
    (fitted, seen), _ = jax.lax.scan(one_penalty, (_start(x, labels), jnp.zeros(x.shape[1], x.dtype)), penalties)
    weight = jnp.abs(fitted[0])
    return seen + 1e-3 * _SMALLEST_PENALTY * largest * weight / jnp.maximum(weight.max(), 1e-30)


def _classification(odds: np.ndarray, labels: Any) -> dict[str, float]:
    guesses = odds > 0
    both = float((guesses & labels).sum())
    shares = [float((guesses == labels)[labels == value].mean()) for value in (True, False)]
    return {
        "accuracy": float((guesses == labels).mean()),
        "balanced_accuracy": sum(shares) / 2,
        "f1": 2 * both / float(guesses.sum() + labels.sum()),
        "auc": _auc(odds, labels),
        "loss": float(np.mean(np.logaddexp(0, odds) - labels * odds)),
    }


def _auc(odds: np.ndarray, labels: Any) -> float:
    """Computes the share of pairs in the right order (ties count half) from the ranks of the positive examples."""
    _, place, count = np.unique(odds, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    positive, negative = labels.sum(), (~labels).sum()
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _examples(activations: Any, targets: Any, labels: bool) -> tuple[jax.Array, jax.Array]:
    """Checks and returns float32 activations ``[example, feature]``, targets ``[example]`` or ``[example, output]``."""
    features, values = jnp.asarray(activations), jnp.asarray(targets)
    leading = features.shape[:-1]
    extra = values.ndim - len(leading)
    if features.ndim < 2 or values.shape[: len(leading)] != leading or extra not in ((0,) if labels else (0, 1)):
        wanted = "one label" if labels else "one target (or several, on a last axis)"
        raise InputError(
            f"Activations [..., feature] need {wanted} for each example; got shapes {features.shape} and "
            f"{values.shape}."
        )
    features = features.reshape(-1, features.shape[-1]).astype(jnp.float32)
    values = values.reshape(features.shape[0], *values.shape[len(leading) :]).astype(jnp.float32)
    if isinstance(features, Tracer) or isinstance(values, Tracer):
        return features, values
    if not (bool(jnp.isfinite(features).all()) and bool(jnp.isfinite(values).all())):
        raise InputError("Activations or targets hold numbers that are not finite.")
    if labels and set(np.unique(np.asarray(values)).tolist()) != {0.0, 1.0}:
        found = np.unique(np.asarray(values))[:5].tolist()
        raise InputError(f"Labels must be 0 and 1, with examples of both; got {found}.")
    return features, values


def _check_penalty(l2: Any) -> None:
    check_type(l2, float, "l2")
    if not isinstance(l2, Tracer) and not 0 <= l2 < np.inf:
        raise InputError(f"l2={l2} must be 0 or more, and finite.")
