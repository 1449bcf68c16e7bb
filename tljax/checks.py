"""Checks of arguments: flags, whole numbers, choices, and indices of things that must exist.

:func:`typed` checks a function's simple arguments against their annotations, :func:`check_fields` a dataclass's fields.
The other functions check bounds and indices. A traced value has no number to check: functions that need one refuse it,
and :func:`take` gives NaN for an index out of range.
"""

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.errors import ArgumentError, InputError, OffloadError, TljaxError, nearest
from tljax.offload import HostBlocks

_P = ParamSpec("_P")
_R = TypeVar("_R")

_DTYPES: dict[Any, str] = {bool: "b", int: "iu", float: "iuf"}
_NAMES: dict[Any, str] = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text", types.NoneType: "None",
}  # fmt: skip


class _ItsOwn:
    """Placeholder in a signature for a default value that is decided later."""

    def __repr__(self) -> str:
        return "..."


_ITS_OWN = _ItsOwn()


def typed(
    function: Callable[_P, _R],
    error: type[TljaxError] = InputError,
    receiver: Callable[..., Any] | None = None,
) -> Callable[_P, _R]:
    """Makes a function check its arguments: their names, and values that are flags, numbers, strings or choices.

    Without it ``truncate="no"`` would count as true, and ``reduce="non"`` as whichever case the code tests last.
    Arguments with any other annotation, or one in quotes, are left to the function. The keys of
    ``**options: Unpack[SomeTypedDict]`` count as arguments: they are checked, and ``help`` and completion show them.

    Args:
        function: the function.
        error: class of the error for a value that does not fit; its message says what would.
        receiver: the function that ``**options`` are passed on to; the signature shows its default values.

    Raises:
        ArgumentError: when called with an unknown name (the message gives the nearest one), or with a keyword-only
            argument by position.
    """
    parameters: dict[str, inspect.Parameter] = {}

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not parameters:
            parameters.update(_signature(function, receiver).parameters)
        for parameter, value in zip(parameters.values(), args, strict=False):
            if parameter.kind is parameter.VAR_POSITIONAL:
                break
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise _misnamed(function, parameters, None)
            _check(value, parameter, error)
        for name, value in kwargs.items():
            if (parameter := parameters.get(name)) is not None and parameter.kind is not parameter.VAR_KEYWORD:
                _check(value, parameter, error)
            elif not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
                raise _misnamed(function, parameters, name)
        return function(*args, **kwargs)

    if any(get_origin(annotation) is Unpack for annotation in function.__annotations__.values()):
        checked.__signature__ = _signature(function, receiver)  # type: ignore[attr-defined]
    return checked


def _signature(function: Callable[..., Any], receiver: Callable[..., Any] | None) -> inspect.Signature:
    """Returns the signature, with ``**options: Unpack[...]`` replaced by one keyword argument for each key."""
    signature, parameters = inspect.signature(function), []
    received = {} if receiver is None else inspect.signature(receiver).parameters
    for one in signature.parameters.values():
        if get_origin(one.annotation) is not Unpack:
            parameters.append(one)
            continue
        for name, annotation in get_type_hints(get_args(one.annotation)[0]).items():
            default = received[name].default if name in received else _ITS_OWN
            parameters.append(inspect.Parameter(name, one.KEYWORD_ONLY, default=default, annotation=annotation))
    return signature.replace(parameters=parameters)


def _misnamed(
    function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], name: str | None
) -> ArgumentError:
    """Returns the error for an unknown argument ``name``; with ``None``, for a keyword-only one given by position."""
    owner = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    known = [each for number, each in enumerate(parameters) if number or each not in ("self", "cls", "cache")]
    if name is not None:
        return ArgumentError(f"{owner} has no option {name!r}.{nearest(name, known)} Options: {', '.join(known)}.")
    by_name = [each for each in known if parameters[each].kind is inspect.Parameter.KEYWORD_ONLY]
    first = ", ".join(each for each in known if each not in by_name) or "nothing"
    return ArgumentError(f"{owner} takes {first} by position, and by name: {'=, '.join(by_name)}=.")


def _check(value: Any, parameter: inspect.Parameter, error: type[TljaxError]) -> None:
    if value is not parameter.default:
        check_type(value, parameter.annotation, parameter.name, error)


def check_type(value: Any, annotation: Any, name: str, error: type[TljaxError] = InputError) -> None:
    """Raises an error if a value does not fit an annotation made of flags, numbers, strings and choices."""
    if fits(value, annotation) is False:
        options = [option for option in _choices(annotation) if isinstance(option, str)]
        raise error(f"{name}={value!r} is not {_expected(annotation)}.{nearest(str(value), options)}")


def check_fields(instance: Any, error: type[TljaxError] = InputError) -> None:
    """Raises an error if a field of a dataclass does not fit its annotation (see :func:`typed`)."""
    for field in dataclasses.fields(instance):
        check_type(getattr(instance, field.name), field.type, field.name, error)


def fits(value: Any, annotation: Any) -> bool | None:
    """Returns whether a value fits an annotation, or ``None`` for an annotation that this module does not check."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        found = [fits(value, one) for one in get_args(annotation)]
        return True if True in found else None if None in found else False
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(annotation))
    if origin is tuple:
        of, *rest = get_args(annotation)
        if rest != [...] or fits(None, of) is None:
            return None
        return isinstance(value, list | tuple | np.ndarray) and all(fits(one, of) for one in value)
    if origin is Sequence:
        return _is_sequence(value, get_args(annotation)[0])
    if annotation is types.NoneType or annotation is None:
        return value is None
    if annotation is str:
        return isinstance(value, str)
    return _is_number(value, annotation) if annotation in (bool, int, float) else None


def _is_sequence(value: Any, entry: Any) -> bool | None:
    """Returns whether this is a list of values that fit ``entry``; ``None`` if not checked, as for JAX arrays."""
    if fits(None, entry) is None:
        return None
    if isinstance(value, list | tuple | range) or (isinstance(value, np.ndarray) and value.ndim):
        return all(fits(one, entry) for one in value)
    if isinstance(value, str):
        return fits(value, entry)
    return False if isinstance(value, bool | int | float) else None


def _is_number(value: Any, kind: type) -> bool:
    """Whether this is one value of type ``kind``, from Python, NumPy or JAX; a whole number counts as a float."""
    if isinstance(value, bool | int | float):
        if isinstance(value, bool) or kind is bool:
            return isinstance(value, bool) and kind is bool
        return isinstance(value, int) if kind is int else not math.isnan(value)
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        return False
    is_float = kind is float and jnp.issubdtype(value.dtype, jnp.floating)  # bfloat16 too, which numpy does not know
    right = np.ndim(value) == 0 and (is_float or np.dtype(value.dtype).kind in _DTYPES[kind])
    return right and not (is_float and isinstance(value, np.ndarray | np.generic) and bool(np.isnan(value)))


def _expected(annotation: Any) -> str:
    origin = get_origin(annotation)
    parts: tuple[Any, ...] = get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, parts))
    if origin is Literal:
        names = ", ".join(map(repr, parts))
        return f"one of {names}" if len(parts) > 1 else names
    if origin in (tuple, Sequence):
        return f"a list, each entry {_expected(parts[0])}"
    return _NAMES.get(annotation, str(annotation))


def _choices(annotation: Any) -> list[Any]:
    parts = get_args(annotation)
    return list(parts) if get_origin(annotation) is Literal else [one for part in parts for one in _choices(part)]


def whole(
    value: Any, name: str, at_least: int | None = None, at_most: int | None = None, error: type[TljaxError] = InputError
) -> int:
    """Returns a whole number as a Python int, after checking its bounds.

    >>> whole(np.int64(3), "count", at_least=1)
    3
    """
    if isinstance(value, Tracer):
        raise error(f"{name} must be known while a program is traced: pass it as a Python number, not through jax.jit.")
    in_words = _NAMES[int]
    if at_least is not None and at_most is not None:
        in_words += f" from {at_least} to {at_most}"
    elif at_least is not None:
        in_words += f" of at least {at_least}"
    if not _is_number(value, int) or (at_least is not None and value < at_least):
        raise error(f"{name}={value!r} must be {in_words}.")
    if at_most is not None and value > at_most:
        raise error(f"{name}={value!r} is out of range: it must be {in_words}.")
    return int(value)


def entry(value: Any, size: int, name: str, things: str, error: type[TljaxError] = InputError) -> int:
    """Returns an index below ``size`` as a Python int; a negative one counts from the end.

    >>> entry(-1, 4, "head", "heads")
    3
    """
    if isinstance(value, Tracer):
        raise error(f"{name} must be known while a program is traced: pass it as a Python number, not through jax.jit.")
    if not _is_number(value, int):
        raise error(f"{name}={value!r} must be a whole number: one of {size} {things}, 0 to {size - 1}.")
    if not -size <= value < size:
        raise error(
            f"{name}={int(value)} is out of range: there are {size} {things}, 0 to {size - 1} (or negative, from the "
            "end)."
        )
    return int(value) % size


def layers(given: Any, n_layers: int, name: str = "layers", error: type[TljaxError] = InputError) -> tuple[int, ...]:
    """Returns layer numbers, at least one; ``None`` means all layers, and negative numbers count from the end."""
    if given is None:
        return tuple(range(n_layers))
    if not isinstance(given, list | tuple | range) and not (isinstance(given, np.ndarray | jax.Array) and given.ndim):
        raise error(f"{name}={given!r} must be a list of layer numbers, such as {name}=[0, {n_layers - 1}].")
    numbers = tuple(entry(layer, n_layers, f"{name}[{n}]", "layers", error) for n, layer in enumerate(given))
    if not numbers:
        raise error(f"{name}= is empty: name at least one layer.")
    return numbers


def fits_int32(ids: np.ndarray) -> bool:
    """Whether integers keep their values as int32: ``2**32 + 5`` would silently become 5."""
    return not ids.size or (int(ids.min()) >= -(2**31) and int(ids.max()) < 2**31)


def take(array: jax.Array, ids: Any, axis: int = 0) -> jax.Array:
    """Returns entries of an axis by index; an index that is negative or out of range gives NaN (-1 for integers).

    A traced index cannot be refused, and JAX would silently take the nearest entry.

    >>> take(jnp.asarray([10.0, 20.0]), jnp.asarray([1, 2, -1]))
    Array([20., nan, nan], dtype=float32)
    """
    numbers = jnp.asarray(ids)
    numbers = numbers.astype(jnp.int32) if numbers.dtype.itemsize < 4 else numbers
    numbers = jnp.where(numbers < 0, jnp.asarray(array.shape[axis], numbers.dtype), numbers)
    return jnp.take(array, numbers, axis=axis, mode="fill", fill_value=missing(array.dtype))


def missing(dtype: Any) -> float | int:
    """Returns the fill value for entries that do not exist: NaN, or -1 for integer dtypes."""
    return math.nan if jnp.issubdtype(dtype, jnp.inexact) else -1


def is_traced(*values: Any) -> bool:
    """Whether any leaf of these pytrees is traced by a caller's ``jit``, ``grad`` or ``vmap``."""
    try:
        leaves = jax.tree.leaves(values)
    except OffloadError:  # blocks on the host are not traced; what lies beside them may be
        found = jax.tree.leaves(values, is_leaf=lambda node: isinstance(node, HostBlocks))
        leaves = jax.tree.leaves([one.beside if isinstance(one, HostBlocks) else one for one in found])
    return any(isinstance(leaf, Tracer) for leaf in leaves)
