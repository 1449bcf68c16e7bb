"""JSON files of feature circuits."""

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tljax.errors import CheckpointError
from tljax.fingerprint import FORM, Fingerprint, WeightSample
from tljax.safetensors_files import own_errors, parse_json, replace_file
from tljax.schema import mismatch

_FORM = "tljax feature circuit 1"
_INTEGERS, _NUMBERS = ("point", "feature", "pos", "source", "target"), ("effect", "weight")
_SCHEMA = {
    "format": str, "points": [str], "widths": [int], **{name: [int] for name in _INTEGERS},
    **{name: [float] for name in _NUMBERS}, "by_position": bool, "node_threshold": float, "edge_threshold": float,
    "convention": str, "model": (None, FORM), "dictionaries": [(None, {"values": str, "rounding": float})],
}  # fmt: skip


def write_fields(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Writes the fields of a circuit, replacing a file as a whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    model, samples = fields["model"], fields["dictionaries"]
    stored = {
        "format": _FORM,
        **{name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()},
        "model": None if model is None else model.to_dict(),
        "dictionaries": [
            None if one is None else {"values": base64.b64encode(one.values).decode(), "rounding": one.rounding}
            for one in samples
        ],
    }
    with replace_file(path) as stream:
        stream.write(json.dumps(stored, allow_nan=False).encode())


def read_fields(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the fields of a circuit.

    Raises:
        CheckpointError: there is no such file, or it is no circuit, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    with own_errors(path, "Write it anew with to_json.", CheckpointError, OSError):
        stored = parse_json(path.read_bytes())
        if not isinstance(stored, dict) or stored.get("format") != _FORM:
            raise CheckpointError(f"{path} does not hold a feature circuit.")
        if problem := mismatch(stored, _SCHEMA):
            raise ValueError(problem)
        if not len(stored["points"]) == len(stored["widths"]) == len(stored["dictionaries"]):
            raise ValueError("points, widths and dictionaries are not equally many")
        arrays = {name: np.asarray(stored[name], np.int64) for name in _INTEGERS}
        arrays |= {name: np.asarray(stored[name], np.float64) for name in _NUMBERS}
        samples = [
            None if one is None else WeightSample(base64.b64decode(one["values"], validate=True), one["rounding"])
            for one in stored["dictionaries"]
        ]
        model = None if stored["model"] is None else Fingerprint.from_dict(stored["model"])
    kept = {name: stored[name] for name in ("by_position", "node_threshold", "edge_threshold", "convention")}
    return {
        **kept, **arrays, "points": tuple(stored["points"]), "widths": tuple(stored["widths"]), "model": model,
        "dictionaries": tuple(samples),
    }  # fmt: skip
