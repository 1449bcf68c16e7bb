"""Files of edge scores: what they hold as fields of ``EdgeScores``, whose convention is a dictionary here."""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from tljax.circuits.circuit import Circuit
from tljax.circuits.eap_ig_files import EAPIGGraph, read_eap_ig_json, read_eap_ig_pt
from tljax.circuits.files import ARRAY, MAYBE_ARRAY, decoded, parsed, write_json
from tljax.circuits.scores.convention import EAP_IG
from tljax.errors import InputError

_FORM = "tljax-edge-scores-1"
_CONVENTION = {
    "method": str, "ablation": str, "metric": str, "steps": (None, int), "grid": (None, str), "post_norm": (None, str),
}  # fmt: skip
_ARRAYS = ("values", "baseline", "source_metric", "completeness")
_FIELDS = {
    "axes": [str], "n_prompts": int, "convention": _CONVENTION, "values": ARRAY,
    **dict.fromkeys(_ARRAYS[1:], MAYBE_ARRAY),
}  # fmt: skip


def write_scores(path: str | os.PathLike[str], scores: Any) -> None:
    """Writes an ``EdgeScores`` as tljax's JSON."""
    arrays = {name: getattr(scores, name) for name in _ARRAYS}
    fields = {
        "axes": list(scores.axis_names), "n_prompts": scores.n_prompts,
        "convention": dataclasses.asdict(scores.convention), **arrays,
    }  # fmt: skip
    write_json(path, _FORM, scores.graph, fields, scores.fingerprint)


def read_scores_json(path: str | os.PathLike[str], model: Any) -> dict[str, Any]:
    """Reads tljax's JSON or EAP-IG's as fields of an ``EdgeScores``.

    Raises:
        CheckpointError: the file is missing, damaged, or belongs to another model.
        InputError: its graph is not the model's.
    """
    stored = parsed(path)
    if (read := read_eap_ig_json(path, stored, model)) is not None:
        return _of_eap_ig(read)
    own = decoded(path, stored, _FORM, _FIELDS, "scores of edges", model)
    arrays = {name: None if own.fields[name] is None else jnp.asarray(own.fields[name]) for name in _ARRAYS}
    whose = {"axis_names": tuple(own.fields["axes"]), "graph": own.graph, "fingerprint": own.fingerprint}
    return {**arrays, **whose, "convention": own.fields["convention"], "n_prompts": own.fields["n_prompts"]}


def read_scores_pt(path: str | os.PathLike[str], model: Any) -> dict[str, Any]:
    """Reads EAP-IG's ``.pt``, likewise."""
    return _of_eap_ig(read_eap_ig_pt(path, model))


def as_eap_ig(graph: Any, scores: np.ndarray, circuit: Circuit | None) -> EAPIGGraph:
    """Returns scores ``[writer, reader]`` and a circuit as a file of EAP-IG holds them: scores are negated.

    Raises:
        InputError: the circuit is of another graph, or the format has no place for it.
    """
    if circuit is not None and circuit.graph != graph:
        raise InputError("The circuit is of another graph than the scores.")
    mask = np.zeros(graph.shape, bool) if circuit is None else np.asarray(circuit.mask)
    return EAPIGGraph.of(graph, mask, -scores)


def _of_eap_ig(read: EAPIGGraph) -> dict[str, Any]:
    convention = {"method": EAP_IG, "metric": "minus a loss"}
    return {"values": jnp.asarray(-read.scores, jnp.float32), "graph": read.graph, "convention": convention}
