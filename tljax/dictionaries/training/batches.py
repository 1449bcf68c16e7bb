"""Batches of activations as a function of the step, in the one form that training reads."""

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.dictionaries.maths.config import Tap
from tljax.dictionaries.training.config import TrainingConfig
from tljax.errors import InputError, nearest

Array = jax.Array | np.ndarray
Pair = tuple[Array, Array | None]
"""What is encoded, ``[tokens, d_in]``, and what is reconstructed; ``None`` for the same."""

Batches = Callable[[int], Any]
"""A function from the step (0, 1, ...) to activations. :func:`pairs` says which forms they may have."""


def batch_function(batches: Any, batch_size: int, seed: int) -> Batches:
    """Returns ``batches`` if it is a function of the step, or the batches of rows held in memory.

    Raises:
        InputError: it is neither, or there are fewer rows than ``batch_size``.
    """
    if callable(batches):
        return batches
    if not isinstance(batches, np.ndarray | jax.Array) or batches.ndim < 2:
        raise InputError(
            "batches must be a function from the step to activations [tokens, d_in] (a Reader's batch is one), or an "
            f"array of all rows [rows, d_in], got {type(batches).__name__} of {np.ndim(batches)} dimensions. A "
            "generator cannot be resumed: make batches from the step's number, as in lambda step: make(seed, step)."
        )
    rows = np.asarray(batches)
    per_epoch = len(rows) // batch_size
    if per_epoch < 1:
        raise InputError(f"batch_size={batch_size} is more than the {len(rows)} rows given. Use a smaller one.")

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(rows))

    def batch(step: int) -> np.ndarray:
        epoch, place = divmod(step, per_epoch)
        return rows[order(epoch)[place * batch_size : (place + 1) * batch_size]]

    return batch


def pairs(batches: Batches, cfg: TrainingConfig) -> Callable[[int], Pair]:
    """Returns the batches in the form that training reads.

    A batch may be an array ``[..., d_in]``, whose leading axes are tokens; for transcoders a pair of arrays (what is
    encoded, what is reconstructed); for crosscoders ``[..., n, d_in]``, or one array for each source. A mapping from
    points to arrays gives the arrays at the config's taps.

    Raises:
        InputError: (by the function) a batch has another form, width or number of tokens.
    """

    def pair(step: int) -> Pair:
        batch = batches(step)
        if isinstance(batch, Mapping):
            batch = _at_taps(batch, cfg, step)
        if cfg.n_sources:
            return _sources(batch, cfg, step), None
        if not cfg.transcoder:
            return _rows(batch, cfg.d_in, "d_in", step), None
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(
                f"The batch of step {step} must be a pair, (what a transcoder encodes, what it reconstructs), got "
                f"{_described(batch)}."
            )
        x, y = _rows(batch[0], cfg.d_in, "d_in", step), _rows(batch[1], cfg.width_out, "d_out", step)
        if len(x) != len(y):
            raise InputError(f"The batch of step {step} encodes {len(x)} tokens and reconstructs {len(y)}.")
        return x, y

    return pair


def digest(pair: Pair) -> str:
    """Returns a checksum of a batch, which tells one source of batches from another."""
    value = 0
    for one in pair:
        if one is not None:
            value = zlib.crc32(np.ascontiguousarray(one).reshape(-1).view(np.uint8).data, value)
    return f"{value:08x}"


def _at_taps(batch: Mapping[str, Any], cfg: TrainingConfig, step: int) -> Any:
    if cfg.n_sources:
        return [_at(batch, tap, "reads", step) for tap in cfg.taps] if cfg.taps else list(batch.values())
    if cfg.transcoder:
        return _at(batch, cfg.tap, "reads", step), _at(batch, cfg.tap, "writes", step)
    if cfg.tap.reads is None and len(batch) == 1:
        return next(iter(batch.values()))
    return _at(batch, cfg.tap, "reads", step)


def _at(batch: Mapping[str, Any], tap: Tap, field: str, step: int) -> Any:
    name = getattr(tap, field)
    if name not in batch:
        raise InputError(
            f"The batch of step {step} has activations of {', '.join(batch)}, and the config's tap {field} {name!r}."
            f"{nearest(str(name), batch)} Set tap=Tap({field}=...) to the point to train on."
        )
    return batch[name]


def _sources(batch: Any, cfg: TrainingConfig, step: int) -> Array:
    n = cfg.n_sources or 1
    if isinstance(batch, tuple | list):
        if len(batch) != n:
            raise InputError(f"The batch of step {step} has {len(batch)} sources, the config n_sources={n}.")
        parts = [_rows(one, cfg.d_in, "d_in", step) for one in batch]
        if len({len(part) for part in parts}) > 1:
            counts = [len(part) for part in parts]
            raise InputError(f"The sources of step {step} have {counts} tokens; they must agree.")
        return np.concatenate([np.asarray(part) for part in parts], axis=-1)
    if np.ndim(batch) < 3 or np.shape(batch)[-2:] != (n, cfg.d_in):
        raise InputError(
            f"The batch of step {step} must be [..., n_sources, d_in] = [..., {n}, {cfg.d_in}], or one array for each "
            f"source, got {_described(batch)}."
        )
    return batch.reshape(-1, n * cfg.d_in)


def _rows(batch: Any, width: int, name: str, step: int) -> Array:
    if not isinstance(batch, np.ndarray | jax.Array) or batch.ndim < 2 or not jnp.issubdtype(batch.dtype, jnp.floating):
        raise InputError(
            f"The batch of step {step} must be floating activations [..., {width}], got {_described(batch)}."
        )
    if batch.shape[-1] != width:
        raise InputError(
            f"The batch of step {step} has width {batch.shape[-1]} ({_described(batch)}), not {name}={width}."
        )
    if not batch.size:
        raise InputError(f"The batch of step {step} has no tokens: {_described(batch)}.")
    return batch.reshape(-1, width)


def _described(batch: Any) -> str:
    if isinstance(batch, np.ndarray | jax.Array):
        return f"{batch.dtype}{list(batch.shape)}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)}: " + ", ".join(_described(one) for one in batch[:4])
    return type(batch).__name__
