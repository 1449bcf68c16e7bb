"""Schemas of JSON values, written as examples of them."""

import math
from collections.abc import Mapping
from typing import Any


def mismatch(value: Any, spec: Any, where: str = "it") -> str | None:
    """Returns what is wrong with a JSON value, or ``None`` if it matches ``spec``.

    Args:
        value: what was read.
        spec: ``bool``, ``str``, ``int`` or ``float`` (which must be finite; whole numbers are numbers too) for a value
            of that type; ``dict`` for any object; ``None`` for null; a set for one of its members; a tuple of specs for
            any of them; ``[spec]`` for a list; ``{str: spec}`` for an object of any keys; ``{"key": spec, …}`` for one
            of exactly these keys, where ``"key?"`` may be absent.
        where: name of the value in the message.

    >>> mismatch({"layers": [0, 2.5]}, {"layers": [int]}, "lens")
    "lens['layers'][1] is 2.5, expected int"
    """
    if isinstance(spec, tuple):
        return None if any(mismatch(value, one) is None for one in spec) else _expected(value, spec, where)
    if isinstance(spec, list):
        if not isinstance(value, list):
            return _expected(value, spec, where)
        found = (mismatch(one, spec[0], f"{where}[{n}]") for n, one in enumerate(value))
        return next((problem for problem in found if problem), None)
    if isinstance(spec, dict):
        return _object_mismatch(value, spec, where)
    return None if _is(value, spec) else _expected(value, spec, where)


def _object_mismatch(value: Any, spec: Mapping[Any, Any], where: str) -> str | None:
    if not isinstance(value, dict):
        return _expected(value, dict, where)
    if str in spec:
        specs = dict.fromkeys(value, spec[str])
    else:
        specs = {key.removesuffix("?"): one for key, one in spec.items()}
        if absent := [key for key in spec if not key.endswith("?") and key not in value]:
            return f"{where} lacks {absent[0]!r}"
        if unknown := [key for key in value if key not in specs]:
            return f"{where} has an unknown entry {unknown[0]!r}"
    found = (mismatch(one, specs[key], f"{where}[{key!r}]") for key, one in value.items())
    return next((problem for problem in found if problem), None)


def _is(value: Any, spec: Any) -> bool:
    if spec is None:
        return value is None
    if isinstance(spec, set | frozenset):
        return isinstance(value, str) and value in spec
    if spec is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if spec is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, spec)


def _expected(value: Any, spec: Any, where: str) -> str:
    text = repr(value)
    return f"{where} is {text if len(text) <= 60 else text[:57] + '...'}, expected {_described(spec)}"


def _described(spec: Any) -> str:
    if isinstance(spec, tuple):
        return " or ".join(map(_described, spec))
    if isinstance(spec, set | frozenset):
        return "one of " + ", ".join(sorted(spec))
    if isinstance(spec, list):
        return f"a list of {_described(spec[0])}"
    if isinstance(spec, dict) or spec is dict:
        return "an object"
    return "null" if spec is None else spec.__name__
