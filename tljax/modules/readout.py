"""What is read of the logits, some positions at a time: the logits of all are never in memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.memory import WORKING_BYTES
from tljax.modules.embedding import HeadStage
from tljax.modules.stack import head_module
from tljax.numerics import matmul_precision
from tljax.typing import Params

CPU_BYTES = 26 * 2**20
"""Most bytes of logits at once on a CPU: products as fast as of all of them, and little memory."""

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Readout:
    """The end of a model: final norm, unembedding, multiplier and soft cap; a pytree.

    Attributes:
        params: ``ln_final`` and ``unembed``.
        module: the head.
    """

    params: Params
    module: HeadStage = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, cfg: HookedTransformerConfig, params: Params) -> "Readout":
        """Returns the end of a model with these parameters, of which others may be missing."""
        return cls({name: params[name] for name in ("ln_final", "unembed") if name in params}, head_module(cfg))

    def logits(self, stream: jax.Array) -> jax.Array:
        """Maps the final residual stream ``[batch, pos, d_model]`` to logits ``[batch, pos, d_vocab_out]``."""
        with matmul_precision(self.module.cfg):
            logits: Any = self.module.apply({"params": self.params}, stream)
        return logits


@functools.partial(jax.jit, static_argnames=("function", "n_logits", "at_once"))
def by_positions(
    function: Callable[..., T],
    readout: Readout | tuple[Readout, ...],
    *arrays: Any,
    beside: tuple[Any, ...] = (),
    n_logits: int = 1,
    at_once: int | None = None,
) -> T:
    """Calls a function that unembeds streams and reduces over the vocabulary, on some positions at a time.

    Where there are several parts, a backward pass unembeds each again, instead of keeping its logits.

    Args:
        function: called as ``function(readout, *arrays, *beside)`` with these of some positions; returns arrays
            ``[batch, pos, ...]`` of those. One object for all calls (a function of a module), or each call compiles.
        readout: the end of the model; or the ends of several, which the function takes as they are.
        *arrays: streams, labels, ``[batch, pos, ...]``.
        beside: large ones that are cut in place and so need no copy, such as the log-probabilities of another run;
            slower to differentiate.
        n_logits: how many arrays of logits the function holds at once: for more, positions are fewer.
        at_once: how many positions are unembedded at once; ``None`` chooses by the memory that their logits take.

    Returns:
        What the function returns, of all positions.
    """
    batch, pos = arrays[0].shape[:2]
    size = positions_at_once(batch, readout, n_logits) if at_once is None else at_once
    if size >= pos:
        return function(readout, *arrays, *beside)
    part = jax.checkpoint(function, prevent_cse=False)
    count = pos // size

    def apart(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array[:, : count * size].reshape(batch, count, size, *array.shape[2:]), 1, 0)

    def together(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, 0, 1).reshape(batch, count * size, *array.shape[3:])

    def one(chunk: tuple[jax.Array, tuple[Any, ...]]) -> T:
        number, parts = chunk
        cut = (jax.lax.dynamic_slice_in_dim(array, number * size, size, axis=1) for array in beside)
        return part(readout, *parts, *cut)

    found = jax.tree.map(together, jax.lax.map(one, (jnp.arange(count), tuple(map(apart, arrays)))))
    if count * size == pos:
        return found
    rest = part(readout, *(array[:, count * size :] for array in (*arrays, *beside)))
    return jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), found, rest)


def positions_at_once(batch: int, readout: Readout | tuple[Readout, ...], n_logits: int = 1) -> int:
    """Returns how many positions of each prompt are unembedded at once."""
    cfg = (readout if isinstance(readout, Readout) else readout[0]).module.cfg
    fit = CPU_BYTES if jax.default_backend() == "cpu" else WORKING_BYTES
    return max(1, fit // (batch * cfg.d_vocab_out * jnp.dtype(cfg.jnp_dtype).itemsize * n_logits))
