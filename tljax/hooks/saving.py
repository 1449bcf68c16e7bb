"""Interventions on disk: a list of (hook name, intervention) pairs as one safetensors file."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.errors import InterventionError
from tljax.hooks import interventions
from tljax.hooks.interventions import Chain, Intervention
from tljax.hooks.selectors import Selector
from tljax.safetensors_files import read_own, write_own

_FORMAT = "tljax-interventions-1"


def save_interventions(hooks: Sequence[tuple[str, Intervention]], path: str | os.PathLike[str]) -> None:
    """Writes ``[(hook name, intervention), ...]``, the form ``fwd_hooks`` takes.

    Raises:
        InterventionError: an item is not a name with one of tljax's own interventions.
    """
    arrays: dict[str, np.ndarray] = {}
    described = []
    for number, (name, intervention) in enumerate(hooks):
        if not isinstance(name, str):
            raise InterventionError(f"Only hooks at a name can be saved; item {number} is at {name!r}.")
        described.append({"name": name, "intervention": _describe(intervention, f"{number}", arrays)})
    write_own(path, _FORMAT, arrays, hooks=described)


def load_interventions(path: str | os.PathLike[str]) -> list[tuple[str, Intervention]]:
    """Reads what :func:`save_interventions` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or something else.
    """
    arrays, header = read_own(path, _FORMAT, "interventions that save_interventions wrote")
    return [(item["name"], _rebuild(item["intervention"], arrays)) for item in header["hooks"]]


def _describe(intervention: Any, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    kind = type(intervention)
    if getattr(interventions, kind.__name__, None) is not kind:
        raise InterventionError(f"{kind.__name__} is not one of tljax's interventions and cannot be saved.")
    if isinstance(intervention, Chain):
        parts = [_describe(part, f"{prefix}.{n}", arrays) for n, part in enumerate(intervention.parts)]
        return {"type": "Chain", "parts": parts}

    def keep(key: str, value: Any) -> str | None:
        if value is None:
            return None
        arrays[f"{prefix}.{key}"] = np.array(value, order="C")  # ascontiguousarray would make a scalar 1-D
        return f"{prefix}.{key}"

    return {
        "type": kind.__name__,
        "arrays": {key: keep(key, getattr(intervention, key)) for key in (*kind.arrays, "mask")},
        "settings": {key: list(getattr(intervention, key)) for key in kind.settings},
        "at": [
            {"axis": s.axis, "slice": [s.payload.start, s.payload.stop, s.payload.step]}
            if s.kind == "slice"
            else {"axis": s.axis, "span": s.payload}
            if s.kind == "span"
            else {"axis": s.axis, "kind": s.kind, "payload": keep(f"at.{s.axis}", s.payload)}
            for s in intervention.at
        ],
    }


def _rebuild(described: dict[str, Any], arrays: dict[str, Any]) -> Intervention:
    kind = getattr(interventions, described["type"])
    if kind is Chain:
        return Chain(*(_rebuild(part, arrays) for part in described["parts"]))
    selectors = tuple(
        Selector(item["axis"], slice(*item["slice"]) if "slice" in item else item["span"])
        if "slice" in item or "span" in item
        else Selector.stored(item["axis"], item["kind"], arrays[item["payload"]])
        for item in described["at"]
    )
    values = {key: None if stored is None else arrays[stored] for key, stored in described["arrays"].items()}
    return kind.stored(values | {key: tuple(v) for key, v in described["settings"].items()}, selectors)
