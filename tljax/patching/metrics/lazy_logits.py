"""Logits that are computed where they are read: an index costs only its rows and columns of the unembedding."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.lib.mixins import NDArrayOperatorsMixin

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.modules.readout import Readout, by_positions
from tljax.patching.metrics.reads import FEW, PositionNotKept, Read, Reads, check_indices, unembed
from tljax.typing import Params

_METHODS_OF_CONCRETE_ARRAYS = ("tolist", "block_until_ready")


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LazyLogits(NDArrayOperatorsMixin):
    """Logits ``[batch, pos, d_vocab_out]`` that are computed where they are read.

    Indexing follows NumPy and unembeds only what is indexed: ``logits[0, -1, paris]`` is one dot product. Leading
    indices alone (``logits[:, -1]``) give another lazy view, so ``logits[0][-1][paris]`` costs the same. Any other use
    as an array (``jnp`` functions, arithmetic, methods, ``np.asarray``) first computes the viewed part. Indices out of
    range raise an error, where a JAX array would clamp them. Lazy logits are a pytree: they may be an argument of a
    jitted function, and stay lazy there.

    Args:
        cfg: the model's config.
        params: parameters with ``unembed`` and, if the model has one, ``ln_final``; others are ignored.
        residual: final residual stream ``[batch, pos, d_model]``; ``[batch, 1, d_model]`` with ``kept``.
        length: number of positions the logits stand for; needed with ``kept``.
        kept: the only position that ``residual`` holds.
        known: values of reads that are computed already, by ``Read.key``.
        reads: records what is read.
        views: whether leading indices give lazy views, rather than arrays.
        trusted: whether a traced position is assumed to be ``kept``.
        rows: for a view, the prompt and the position of each of its rows.
        named: for a view, whether its positions were given as numbers, rather than by slices alone.
    """

    cfg: HookedTransformerConfig
    params: Params
    residual: Any
    length: int | None = dataclasses.field(default=None, kw_only=True)
    kept: int | None = dataclasses.field(default=None, kw_only=True)
    known: Mapping[Any, Any] = dataclasses.field(default_factory=dict, kw_only=True)
    reads: Reads | None = dataclasses.field(default=None, kw_only=True)
    views: bool = dataclasses.field(default=True, kw_only=True)
    trusted: bool = dataclasses.field(default=False, kw_only=True)
    rows: tuple[Any, Any] | None = dataclasses.field(default=None, kw_only=True)
    named: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.rows is not None:
            return (*self.rows[0].shape, self.cfg.d_vocab_out)
        length = self.residual.shape[1] if self.length is None else self.length
        return (self.residual.shape[0], length, self.cfg.d_vocab_out)

    @property
    def dtype(self) -> Any:
        return self.params["unembed"]["W_U"].dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return bool(self.__jax_array__())

    def __repr__(self) -> str:
        return f"LazyLogits(shape={self.shape}, dtype={self.dtype})"

    def __jax_array__(self) -> jax.Array:
        prompts, positions = np.indices(self.shape[:-1]) if self.rows is None else self.rows
        return self._values(Read(prompts, positions, named=self.named))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.__jax_array__(), dtype=dtype)
        return array.copy() if copy else array

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Applies operators and NumPy's functions, with the ``jax.numpy`` function of the same name if there is one."""
        function = getattr(jnp, ufunc.__name__, None)
        if method == "__call__" and function is not None and not options:
            return function(*(jnp.asarray(each) if isinstance(each, LazyLogits) else each for each in inputs))
        arrays = (np.asarray(each) if isinstance(each, LazyLogits) else each for each in inputs)
        return getattr(ufunc, method)(*arrays, **options)

    def __iter__(self) -> Iterator[Any]:
        return (self[n] for n in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not (hasattr(jax.Array, name) or name in _METHODS_OF_CONCRETE_ARRAYS):
            raise AttributeError(f"LazyLogits has no attribute {name!r}.")
        return getattr(self.__jax_array__(), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise InputError(
            "Logits cannot be assigned to in place: JAX arrays do not change. logits.at[index].set(value) returns "
            "changed logits."
        )

    def __getitem__(self, index: Any) -> Any:
        parts = _parts(index if isinstance(index, tuple) else (index,), self.shape)
        axes = [part for part in parts if part is not None]
        named = self.named
        for axis, part in enumerate(axes):
            if not isinstance(part, slice):
                what = self._name_of(axis)
                check_indices(part, self.shape[axis], what)
                named |= what == "position"
        if not isinstance(axes[-1], slice):
            *along, tokens = _follow(parts, self.shape)
            return self._picked(Read(*self._rows_at(along, tokens.shape), tokens, named))
        at = max(n for n, part in enumerate(parts) if part is not None)  # new axes may come after the tokens
        view = dataclasses.replace(self, rows=self._rows_at(_follow(parts[:at], self.shape), (1,) * at), named=named)
        if parts[at:] == [slice(None)]:
            return view if self.views else view.__jax_array__()
        return view.__jax_array__()[..., *parts[at:]]

    def _name_of(self, axis: int) -> str:
        """Returns what the entries of an axis are: a prompt, a position or a token."""
        if axis == self.ndim - 1 or self.rows is None:
            return ("prompt", "position")[axis] if axis < self.ndim - 1 else "token"
        positions = self.rows[1]
        return "position" if isinstance(positions, Tracer) or np.diff(positions, axis=axis).any() else "prompt"

    def _rows_at(self, along: Sequence[Any], shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Returns prompts and positions of the rows at indices ``along``, or of the only row broadcast to ``shape``."""
        if self.rows is None:
            return along[0], along[1]
        library: Any = jnp if any(isinstance(part, Tracer) for part in (*self.rows, *along)) else np
        prompts, positions = (
            library.asarray(rows)[tuple(along)] if along else library.broadcast_to(rows, shape) for rows in self.rows
        )
        return prompts, positions

    def _picked(self, read: Read) -> Any:
        """Returns one logit of each row; if these are many, each whole row is computed once."""
        if read.key is None or read.tokens.size <= FEW:
            return self._values(read)
        n_positions = int(read.positions.max()) + 1
        rows, inverse = np.unique(read.prompts * n_positions + read.positions, return_inverse=True)
        values = self._values(Read(rows // n_positions, rows % n_positions, named=read.named))
        return values[inverse.reshape(read.tokens.shape), read.tokens]

    def _values(self, read: Read) -> jax.Array:
        if self.reads is not None:
            self.reads.record(read)
        if self.known and (key := read.key) in self.known:
            return jnp.asarray(self.known[key])
        params = {name: self.params[name] for name in ("ln_final", "unembed") if name in self.params}
        return unembed(self.cfg, params, self._residual_at(read.prompts, read.positions), read.tokens)

    def _residual_at(self, prompts: Any, positions: Any) -> Any:
        """Returns rows of the residual stream, NaN where a traced position was not kept."""
        traced = isinstance(positions, Tracer)
        if self.kept is not None:
            if traced and not self.trusted:
                raise PositionNotKept(f"The metric read a position that it computes, and only {self.kept} was kept.")
            if not traced and (positions != self.kept).any():
                raise PositionNotKept(f"The metric read other positions than {self.kept}, the only one that was kept.")
            positions = (positions != self.kept).astype(np.int32)
        if isinstance(self.residual, np.ndarray) and not (traced or isinstance(prompts, Tracer)):
            return self.residual[prompts, positions]  # cut on the host, so that all lengths share a program
        return jnp.asarray(self.residual).at[prompts, positions].get(mode="fill", fill_value=jnp.nan)

    def end(self) -> tuple[Readout, Any] | None:
        """Records a read of the whole view ``[batch, pos, d_vocab_out]``, to be unembedded by parts.

        Returns:
            The end of the model and the stream ``[batch, pos, d_model]`` to apply it to; ``None`` if the logits are
            known already.
        """
        prompts, positions = np.indices(self.shape[:-1]) if self.rows is None else self.rows
        read = Read(prompts, positions, named=self.named)
        if self.known and read.key in self.known:
            return None
        if self.reads is not None:
            self.reads.record(read)
        whole = self.rows is None and self.kept is None
        stream = jnp.asarray(self.residual if whole else self._residual_at(prompts, positions))
        return Readout.of(self.cfg, self.params), stream

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        if self.rows is not None:
            return (self.__jax_array__(),), None
        if self.reads is not None:
            self.reads.jitted = True
        return (self.params, self.residual, self.known), (self.cfg, self.length, self.kept, self.views, self.trusted)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: tuple[Any, ...]) -> Any:
        if aux is None:
            return children[0]
        cfg, length, kept, views, trusted = aux
        params, residual, known = children
        return cls(cfg, params, residual, length=length, kept=kept, known=known, views=views, trusted=trusted)


def reduced(function: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """Calls a function of logits that reduces over the vocabulary; lazy ones are unembedded some positions at a time.

    Args:
        function: takes the arrays, returns ``[batch, pos]``; a function of a module, by which programs are compiled.
        *arrays: logits ``[batch, pos, d_vocab]``, lazy or not, and others ``[batch, pos, ...]``.
    """
    ends = [each.end() if isinstance(each, LazyLogits) and each.ndim == 3 else None for each in arrays]
    lazy = tuple(end is not None for end in ends)
    there = tuple(jnp.asarray(each) for each, is_lazy in zip(arrays, lazy, strict=True) if not is_lazy)
    if not any(lazy):
        return function(*there)
    readouts, streams = zip(*(end for end in ends if end is not None), strict=True)
    return by_positions(_Unembedded(function, lazy), readouts, *streams, beside=there, n_logits=sum(lazy))


@dataclasses.dataclass(frozen=True)
class _Unembedded:
    """A function of logits as one of the streams that lazy ones come from, and of the other arrays."""

    function: Callable[..., jax.Array]
    lazy: tuple[bool, ...]

    def __call__(self, readouts: tuple[Readout, ...], *parts: jax.Array) -> jax.Array:
        streams, others = iter(parts[: len(readouts)]), iter(parts[len(readouts) :])
        logits = iter([readout.logits(stream) for readout, stream in zip(readouts, streams, strict=True)])
        return self.function(*(next(logits if is_lazy else others) for is_lazy in self.lazy))


def _parts(index: Sequence[Any], shape: tuple[int, ...]) -> list[Any]:
    """Expands an index to one slice, array or tracer of numbers for each axis, and ``None`` for each new axis."""
    parts = [_component(part) for part in index]
    named = sum(_axes_of(part) for part in parts)
    ellipses = [n for n, part in enumerate(parts) if part is Ellipsis]
    if len(ellipses) > 1 or named > len(shape):
        fault = "more than one ..." if len(ellipses) > 1 else f"{named} indices"
        raise InputError(f"These logits have {len(shape)} axes, and were indexed with {fault}.")
    at = ellipses[0] if ellipses else len(parts)
    parts[at : at + 1] = [slice(None)] * (len(shape) - named)
    if not any(_is_mask(part) for part in parts):
        return parts
    numbers, axis = [], 0
    for part in parts:
        covered = shape[axis : axis + _axes_of(part)]
        axis += _axes_of(part)
        if _is_mask(part) and part.shape != covered:
            raise InputError(f"The logits were indexed with a mask of shape {part.shape}, along axes of {covered}.")
        numbers.extend(part.nonzero() if _is_mask(part) else [part])
    return numbers


def _is_mask(part: Any) -> bool:
    return isinstance(part, np.ndarray) and part.dtype == bool


def _axes_of(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    return part.ndim if _is_mask(part) else 1


def _component(part: Any) -> Any:
    if part is None or part is Ellipsis or isinstance(part, slice):
        return part
    array = part if isinstance(part, Tracer) else np.asarray(part)
    if isinstance(array, Tracer) and array.dtype == bool:
        raise jax.errors.NonConcreteBooleanIndexError(array)
    if array.size == 0 and not isinstance(part, np.ndarray | jax.Array):
        array = array.astype(np.int32)
    if np.dtype(array.dtype).kind not in "iub" or (array.dtype == bool and array.ndim == 0):
        raise InputError(
            f"Logits were indexed with {part!r}; indices are numbers, slices and masks. "
            "model.to_single_token(' word') gives the id of a token."
        )
    return array


def _follow(parts: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    """Returns, for each axis, the coordinates ``[*result]`` of the elements that an index selects.

    NumPy itself applies the index, to broadcast arrays of coordinates, which take no memory. Arrays of numbers in the
    index are replaced by 0, 1, 2 … for this, and looked up afterwards, so that they may be tracers.
    """
    axes = [part for part in parts if part is not None]
    if len(axes) == len(parts) and not any(isinstance(part, slice) or part.ndim for part in parts):
        return [_from_zero(part, size) for part, size in zip(parts, shape, strict=False)]
    sizes = [size if isinstance(part, slice) else part.size for part, size in zip(axes, shape, strict=False)]
    counting = tuple(
        part if part is None or isinstance(part, slice) else np.arange(part.size).reshape(part.shape) for part in parts
    )
    which = (np.broadcast_to(counted, sizes)[counting] for counted in np.indices(sizes, np.int32, sparse=True))
    return [
        along if isinstance(part, slice) else _from_zero(part, size).reshape(-1)[along]
        for part, size, along in zip(axes, shape, which, strict=False)
    ]


def _from_zero(numbers: Any, size: int) -> Any:
    """Makes negative indices count from the start; clamps indices out of range, which only tracers may hold."""
    if isinstance(numbers, Tracer):
        return jnp.clip(jnp.where(numbers < 0, numbers + size, numbers), 0, size - 1).astype(jnp.int32)
    return (numbers % size).astype(np.int32)
