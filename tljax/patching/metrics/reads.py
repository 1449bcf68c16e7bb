"""Records of what a metric reads of the logits, and the unembedding of just that."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, TljaxError
from tljax.modules.embedding import final_norm, finish_logits
from tljax.numerics import matmul_precision
from tljax.typing import Params

FEW = 4096
"""Most logits of a read that are computed singly; for more, whole rows are computed."""

_REMEDIES = {
    "position": "Positions count from 0, and -1 is the last: compare model.to_str_tokens(prompt).",
    "token": "model.to_single_token(' word') gives the id of a token.",
    "prompt": "The first axis of the logits is the batch.",
}


class PositionNotKept(TljaxError, IndexError):
    """Error of a metric that reads a position whose residual stream was not kept."""


def check_indices(indices: Any, size: int, what: str) -> None:
    """Raises InputError if an index is out of range, which JAX would clamp silently.

    Args:
        indices: a number or an array of them; tracers are let through.
        size: length of the axis.
        what: ``"prompt"``, ``"position"`` or ``"token"``.
    """
    if isinstance(indices, Tracer):
        return
    array = np.asarray(indices)
    wrong = array[(array < -size) | (array >= size)]
    if wrong.size:
        raise InputError(
            f"There is no {what} {int(wrong.flat[0])} in these logits: they have {size} {what}s, so the last is "
            f"{size - 1}. {_REMEDIES[what]}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """One read of the logits: some rows whole, or one token of each.

    Attributes:
        prompts, positions: prompt and position of each row, arrays of one shape ``[*read]``.
        tokens: the token read of each row ``[*read]``, or ``None`` for all tokens.
        named: whether the positions were given as numbers, rather than by slices alone.
    """

    prompts: Any
    positions: Any
    tokens: Any = None
    named: bool = True

    @functools.cached_property
    def key(self) -> Any:
        """A hashable key of what is read; ``None`` if an index is a tracer."""
        parts = (self.prompts, self.positions, *(() if self.tokens is None else (self.tokens,)))
        if any(isinstance(part, Tracer) for part in parts):
            return None
        return tuple((part.shape, part.tobytes()) for part in parts)


@dataclasses.dataclass(eq=False)
class Reads:
    """Record of what a metric read of a :class:`LazyLogits`.

    Attributes:
        known: each distinct read whose indices were known, by its key.
        anywhere: whether a read had an unknown position, which may be any.
        jitted: whether the logits were passed to a compiled function, whose reads are not seen.
    """

    known: dict[Any, Read] = dataclasses.field(default_factory=dict)
    anywhere: bool = False
    jitted: bool = False
    _elsewhere: set[int] = dataclasses.field(default_factory=set)

    @property
    def positions(self) -> tuple[int, ...] | None:
        """The positions read, sorted; ``None`` if any may have been read."""
        if self.anywhere:
            return None
        return tuple(sorted(self._elsewhere.union(*(read.positions.ravel().tolist() for read in self.known.values()))))

    @property
    def whole_rows(self) -> bool:
        """Whether all logits of a position were read."""
        return any(read.tokens is None for read in self.known.values())

    def elements(self, d_vocab: int) -> int:
        """Returns the number of logits read."""
        return sum(read.positions.size * (d_vocab if read.tokens is None else 1) for read in self.known.values())

    def record(self, read: Read) -> None:
        """Records a read."""
        if read.key is not None:
            self.known[read.key] = read
        elif isinstance(read.positions, Tracer):
            self.anywhere = True
        else:
            self._elsewhere.update(read.positions.ravel().tolist())


@functools.partial(jax.jit, static_argnums=0)
def unembed(cfg: HookedTransformerConfig, params: Params, rows: Any, tokens: Any = None) -> jax.Array:
    """Applies the final norm and the unembedding. Other shapes compile another program; other tokens do not.

    Args:
        cfg: the model's config.
        params: ``ln_final`` and ``unembed``.
        rows: final residual stream ``[..., d_model]``.
        tokens: the token wanted of each row, in a shape that broadcasts with ``[...]``; ``None`` means all tokens.

    Returns:
        Logits, ``[..., d_vocab_out]`` or ``[...]``.
    """
    weights = params["unembed"]
    with matmul_precision(cfg):
        normed: Any = final_norm(cfg).apply({"params": params.get("ln_final", {})}, jnp.asarray(rows))
        if "W_proj" in weights:
            normed = normed @ weights["W_proj"]
        if tokens is None:
            logits, bias = normed @ weights["W_U"], weights["b_U"]
        else:
            columns, bias = jnp.moveaxis(weights["W_U"][:, tokens], 0, -1), weights["b_U"][tokens]
            logits = jnp.einsum("...d,...d->...", normed, columns)
    return finish_logits(cfg, logits + jnp.broadcast_to(bias, logits.shape))
