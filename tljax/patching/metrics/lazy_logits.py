"""Logits that are computed where they are read: an index costs its own rows and columns of the unembedding."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.patching.metrics.reads import Parts, Reads, check_indices, locate, read_key, unembed
from tljax.typing import Params

_METHODS_OF_CONCRETE_ARRAYS = ("tolist", "block_until_ready")


@dataclasses.dataclass(frozen=True, eq=False)
class _Source:
    """What the logits are computed from, shared by all views of them."""

    cfg: HookedTransformerConfig
    params: Params
    residual: Any
    length: int
    kept: int | None
    known: Mapping[Any, Any]
    reads: Reads | None = None
    views: bool = True
    trusted: bool = False
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def whole(self) -> Parts:
        return range(self.residual.shape[0]), range(self.length), range(self.cfg.d_vocab_out)

    def read(self, parts: Parts) -> Any:
        """The logits at ``parts``, as indexing ``[batch, pos, d_vocab]`` with them would give."""
        key = read_key(parts)
        if self.reads is not None:
            self.reads.record(key, parts)
        if key in self.known:
            return self.known[key]
        if key in self.cache:
            return self.cache[key]
        return unembed(self.cfg, self.params, self.residual, locate(parts, self.kept, self.trusted))


@jax.tree_util.register_pytree_node_class
class LazyLogits:
    """Logits ``[batch, pos, d_vocab_out]`` that are computed where they are read.

    Indexing follows NumPy and unembeds only what it names: ``logits[0, -1, paris]`` is one dot product. Leading
    indices alone (``logits[:, -1]``) give another lazy view, so ``logits[0][-1][paris]`` costs the same. Whatever else
    an array can do (``jnp`` functions, arithmetic, methods, ``np.asarray``) computes the viewed part first. Indices
    out of range are errors, where a JAX array would clamp them. A pytree: it may be an argument of a jitted function,
    and stays lazy there.

    Args:
        cfg: the model's config.
        params: parameters with ``unembed`` and, if the model has one, ``ln_final``; others are ignored.
        residual: final residual stream ``[batch, pos, d_model]``; ``[batch, 1, d_model]`` with ``kept``.
        length: number of positions the logits stand for; needed with ``kept``.
        kept: the only position that ``residual`` holds.
        known: values of reads that need no computing, by :func:`read_key`.
        reads: told what is read.
        views: whether leading indices give lazy views, rather than arrays.
        trusted: whether a position that is not known while tracing may be taken for ``kept``.
    """

    _source: _Source
    _parts: Parts
    __array_priority__ = 200

    def __init__(
        self,
        cfg: HookedTransformerConfig,
        params: Params,
        residual: Any,
        *,
        length: int | None = None,
        kept: int | None = None,
        known: Mapping[Any, Any] | None = None,
        reads: Reads | None = None,
        views: bool = True,
        trusted: bool = False,
    ) -> None:
        head = {name: params[name] for name in ("ln_final", "unembed") if name in params}
        positions = int(residual.shape[1]) if length is None else length
        self._source = _Source(cfg, head, residual, positions, kept, known or {}, reads, views, trusted)
        self._parts = self._source.whole()

    def _view(self, parts: Parts) -> "LazyLogits":
        view = object.__new__(LazyLogits)
        view._source, view._parts = self._source, parts
        return view

    @property
    def _free(self) -> list[int]:
        return [axis for axis, part in enumerate(self._parts) if isinstance(part, range)]

    @property
    def shape(self) -> tuple[int, ...]:
        if self._source.reads is not None and isinstance(self._parts[1], range):
            self._source.reads.length_asked = True
        return tuple(len(self._parts[axis]) for axis in self._free)

    @property
    def dtype(self) -> Any:
        return self._source.params["unembed"]["W_U"].dtype

    @property
    def ndim(self) -> int:
        return len(self._free)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def d_vocab(self) -> int:
        """Number of logits at a position; asking it is no sign of reading the others."""
        return self._source.cfg.d_vocab_out

    def __len__(self) -> int:
        return len(self._parts[0]) if self._free[0] == 0 else self.shape[0]

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(len(self._parts[axis]) for axis in self._free)}, dtype={self.dtype})"

    def __jax_array__(self) -> jax.Array:
        value = jnp.asarray(self._value())
        if _outlives_inner_traces(value, self._source.residual):
            self._source.cache[read_key(self._parts)] = value
        return value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self.__jax_array__(), dtype=dtype)
        return array.copy() if copy else array

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__jax_array__())

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
        index = [_component(part) for part in (index if isinstance(index, tuple) else (index,))]
        consumed = [_axes_consumed(part) for part in index]
        ellipses = sum(part is Ellipsis for part in index)
        missing = self.ndim - sum(consumed)
        if ellipses > 1 or missing < 0:
            fault = "more than one ..." if ellipses > 1 else f"{sum(consumed)} indices"
            raise InputError(f"These logits have {self.ndim} axes, and were indexed with {fault}.")
        at = next((n for n, part in enumerate(index) if part is Ellipsis), len(index))
        whole = [slice(None)] * missing
        index = [*index[:at], *whole, *index[at + 1 :]]
        consumed = [*consumed[:at], *(1 for _ in whole), *consumed[at + 1 :]]
        if any(part is None or _is_mask(part) for part in index):
            return self._unusual(index, consumed)
        parts = list(self._parts)
        for axis, part in zip(self._free, index, strict=True):
            parts[axis] = self._compose(axis, part)
        if self._free == [1, 2] and isinstance(parts[1], range) and not isinstance(parts[2], int | range):
            # NumPy's rule for indices on both sides of a slice is about those of one bracket
            number = parts[0]
            return self._view((range(number, number + 1), parts[1], parts[2])).__jax_array__()[0]
        whole_rows = all(isinstance(part, int | range) for part in parts) and parts[2] == self._parts[2]
        lazy = self._view((parts[0], parts[1], parts[2]))
        return lazy if whole_rows and self._source.views else lazy._value()

    def _value(self) -> Any:
        reads = self._source.reads
        if reads is not None and isinstance(self._parts[1], range):
            reads.absolute = True
        return self._source.read(self._parts)

    def _compose(self, axis: int, index: Any) -> Any:
        """The part of the whole logits that ``index`` along one axis of this view names."""
        numbers, what = self._parts[axis], ("prompt", "position", "token")[axis]
        if axis == 1 and self._source.reads is not None:
            self._note_position(index, self._source.reads)
        if isinstance(index, slice):
            return numbers[index]
        check_indices(index, len(numbers), what)
        if isinstance(index, int):
            return numbers[index]
        if isinstance(index, np.ndarray):
            return numbers.start + numbers.step * np.where(index < 0, index + len(numbers), index)
        index = index.astype(jnp.int32)
        clamped = jnp.clip(jnp.where(index < 0, index + len(numbers), index), 0, len(numbers) - 1)
        return numbers.start + numbers.step * clamped

    def _note_position(self, index: Any, reads: Reads) -> None:
        if isinstance(index, int) and index < 0 and self._parts[1] == range(self._source.length):
            reads.offsets.add(index)
        elif not isinstance(index, slice) or index != slice(None):
            reads.absolute = True

    def _unusual(self, index: list[Any], consumed: list[int]) -> Any:
        """Indices with masks or new axes: computes what the numbers and slices among them leave, then indexes that."""
        parts, relative, axes = list(self._parts), [], iter(self._free)
        for part, count in zip(index, consumed, strict=True):
            named = [next(axes) for _ in range(count)]
            if isinstance(part, int | slice) and not isinstance(part, bool):
                composed = self._compose(named[0], part)
                parts[named[0]] = range(composed, composed + 1) if isinstance(composed, int) else composed
                relative.append(0 if isinstance(part, int) else slice(None))
            else:
                if part is not None and not _is_mask(part):
                    self._compose(named[0], part)
                relative.append(part)
        return self._view((parts[0], parts[1], parts[2])).__jax_array__()[tuple(relative)]

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        source, key = self._source, read_key(self._parts)
        if source.reads is not None:
            if self._parts == source.whole():
                source.reads.compiled = True
            else:
                self.__jax_array__()
        for values in (source.known, source.cache):
            if key in values:
                return (values[key],), None
        children = (source.params, source.residual, tuple(source.known.values()))
        static = (source.cfg, source.length, source.kept, source.views, source.trusted)
        return children, (*static, self._parts, tuple(source.known))

    @classmethod
    def tree_unflatten(cls, aux: Any, children: tuple[Any, ...]) -> Any:
        if aux is None:
            return children[0]
        cfg, length, kept, views, trusted, parts, keys = aux
        params, residual, values = children
        known = dict(zip(keys, values, strict=True))
        lazy = object.__new__(cls)
        lazy._source = _Source(cfg, params, residual, length, kept, known, None, views, trusted)
        lazy._parts = parts
        return lazy


def _outlives_inner_traces(value: Any, residual: Any) -> bool:
    """Whether a value computed from ``residual`` may be used wherever it may: not if a trace within its own made it."""
    if not isinstance(value, Tracer):
        return True
    return isinstance(residual, Tracer) and getattr(value, "_trace", value) is getattr(residual, "_trace", residual)


def _component(part: Any) -> Any:
    """One index in the form the rest expects: a number, a slice, an array, a mask, a tracer, ``None`` or ``...``."""
    if type(part) is int or part is None or part is Ellipsis or isinstance(part, Tracer | slice):
        return part
    array = np.asarray(part)
    if array.size == 0 and not isinstance(part, np.ndarray | jax.Array):
        array = array.astype(np.int32)
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind not in "iu":
        raise InputError(
            f"Logits were indexed with {part!r}; indices are numbers, slices and masks. "
            "model.to_single_token(' word') gives the id of a token."
        )
    return int(array) if array.ndim == 0 else array.astype(np.int64)


def _is_mask(part: Any) -> bool:
    return isinstance(part, np.ndarray | Tracer) and part.dtype == bool


def _axes_consumed(part: Any) -> int:
    if part is None or part is Ellipsis:
        return 0
    return part.ndim if _is_mask(part) else 1


def _forward(name: str) -> Any:
    def method(self: LazyLogits, *args: Any) -> Any:
        plain = [arg.__jax_array__() if isinstance(arg, LazyLogits) else arg for arg in args]
        return getattr(self.__jax_array__(), name)(*plain)

    method.__name__ = name
    return method


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_OTHERS = ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "bool")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHERS):
    setattr(LazyLogits, f"__{_name}__", _forward(f"__{_name}__"))
