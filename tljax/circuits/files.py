"""JSON files of circuits and of edge scores: the graph, the arrays, what they mean, and which model they belong to."""

import base64
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tljax.circuits.graph import ResidualGraph
from tljax.errors import CheckpointError
from tljax.fingerprint import FORM, Fingerprint, fingerprint_of
from tljax.safetensors_files import own_errors, parse_json, replace_file
from tljax.schema import mismatch

_GRAPH = {
    "n_layers": int, "n_heads": int, "n_kv_heads": int, "d_model": int, "parallel_attn_mlp": bool, "attn_only": bool,
    "experts": [int],
}  # fmt: skip
_ARRAY = {"dtype": {"bool", "float16", "float32", "float64"}, "shape": [int], "base64": str}
ARRAY, MAYBE_ARRAY = (_ARRAY,), (None, _ARRAY)
"""In the schema of a file's fields: an array, and an array or null."""
_ARRAYS = (ARRAY, MAYBE_ARRAY)
_MOST_NODES = 1_000_000
_REMEDY = "Write it anew with to_json."


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file holds besides its own fields.

    Attributes:
        graph: the graph.
        fields: the fields of the file's kind, arrays decoded.
        fingerprint: the model it was written for; ``None`` if that was not said.
    """

    graph: ResidualGraph
    fields: dict[str, Any]
    fingerprint: Fingerprint | None


def write_json(
    path: str | os.PathLike[str], form: str, graph: ResidualGraph, fields: Mapping[str, Any], of: Fingerprint | None
) -> None:
    """Writes a file, replaced atomically; arrays among the fields are kept to the last bit.

    Args:
        path: the file; missing folders are made.
        form: its kind and version.
        graph: the graph.
        fields: JSON values and arrays.
        of: fingerprint of the model it belongs to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    coded = {
        name: _coded(value) if isinstance(value, np.ndarray | jax.Array) else value for name, value in fields.items()
    }
    stored = {
        "format": form, "graph": dataclasses.asdict(graph), **coded, "model": None if of is None else of.to_dict(),
    }  # fmt: skip
    with replace_file(path) as stream:
        stream.write(json.dumps(stored, allow_nan=False).encode())


def parsed(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        CheckpointError: the file is missing, or is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    with own_errors(path, _REMEDY, CheckpointError, OSError):
        return parse_json(path.read_bytes())


def decoded(
    path: str | os.PathLike[str], stored: Any, form: str, fields: Mapping[str, Any], what: str, model: Any = None
) -> Stored:
    """Reads the JSON value of a file that :func:`write_json` wrote.

    Args:
        path: the file, for errors.
        stored: its value.
        form: the kind that it must be of.
        fields: schema of the fields, in which ``ARRAY`` stands for an array.
        what: the kind in words.
        model: the model that it must belong to, if any.

    Raises:
        CheckpointError: it is something else, damaged, or belongs to another model.
    """
    if not isinstance(stored, dict) or stored.get("format") != form:
        found = f", but {stored['format']!r}" if isinstance(stored, dict) and "format" in stored else ""
        raise CheckpointError(f"{path} does not hold {what}{found}.")
    with own_errors(path, _REMEDY, CheckpointError):
        common = {"format": str, "graph": _GRAPH, "model": (None, FORM)}
        if problem := mismatch(stored, common | dict(fields)):
            raise ValueError(problem)
        graph = _graph_of(stored["graph"])
        own = {name: value for name, value in stored.items() if name not in common}
        found = {name: _array(value) if fields.get(name, fields.get(f"{name}?")) in _ARRAYS else value
                 for name, value in own.items()}  # fmt: skip
        origin = None if stored["model"] is None else Fingerprint.from_dict(stored["model"])
    if model is not None:
        differing = () if origin is None else origin.differences(fingerprint_of(model))
        if differing:
            raise CheckpointError(f"{path} belongs to another model: {'; '.join(differing)}.")
        graph.check(model.cfg)
    return Stored(graph, found, origin)


def _coded(array: Any) -> dict[str, Any]:
    known = np.asarray(array)
    if known.dtype.name not in _ARRAY["dtype"]:  # bfloat16, which NumPy lacks
        known = known.astype(np.float32)
    data = np.ascontiguousarray(known).astype(known.dtype.newbyteorder("<"))
    return {
        "dtype": known.dtype.name, "shape": list(known.shape), "base64": base64.b64encode(data.tobytes()).decode(),
    }  # fmt: skip


def _array(stored: Mapping[str, Any] | None) -> np.ndarray | None:
    if stored is None:
        return None
    dtype, shape = np.dtype(stored["dtype"]).newbyteorder("<"), tuple(stored["shape"])
    data = base64.b64decode(stored["base64"], validate=True)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _graph_of(stored: Mapping[str, Any]) -> ResidualGraph:
    layers, heads, kv = (stored[name] for name in ("n_layers", "n_heads", "n_kv_heads"))
    experts = tuple(stored["experts"])
    if min(layers, heads, kv, stored["d_model"]) < 1 or heads % kv or len(experts) not in (0, layers):
        raise ValueError("its graph is that of no model")
    if layers * (3 * heads + 1) + sum(map(abs, experts)) > _MOST_NODES:
        raise ValueError("its graph is larger than that of any model")
    return ResidualGraph(**{**stored, "experts": experts})
