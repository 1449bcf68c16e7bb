"""Files of circuits: what they hold as fields of ``Circuit``."""

import os
from typing import Any, Literal

import numpy as np

from tljax.circuits.eap_ig_files import EAPIGGraph, read_eap_ig_json, read_eap_ig_pt, write_eap_ig_json
from tljax.circuits.files import ARRAY, decoded, parsed, write_json
from tljax.errors import CheckpointError
from tljax.fingerprint import fingerprint_of
from tljax.safetensors_files import own_errors

_FORM = "tljax-circuit-1"
_FIELDS = {"name": str, "axes": [str], "edges?": [str], "mask?": ARRAY}


def write_circuit(
    path: str | os.PathLike[str], circuit: Any, mask: np.ndarray, model: Any, layout: Literal["tljax", "eap-ig"]
) -> None:
    """Writes a ``Circuit`` whose mask is known as JSON.

    Raises:
        InputError: a circuit that the layout has no place for, or another model's.
    """
    graph = circuit.graph
    if model is not None:
        graph.check(model.cfg)
    if layout == "eap-ig":
        write_eap_ig_json(path, EAPIGGraph.of(graph, mask))
        return
    named = not circuit.axes and mask.dtype == bool
    edges = {"edges": circuit.names()} if named else {"mask": mask}
    fields = {"name": circuit.name, "axes": list(circuit.axes), **edges}
    write_json(path, _FORM, graph, fields, None if model is None else fingerprint_of(model))


def read_circuit_json(path: str | os.PathLike[str], model: Any) -> dict[str, Any]:
    """Reads tljax's JSON or EAP-IG's as fields of a ``Circuit``.

    Raises:
        CheckpointError: the file is missing, damaged, names what its graph lacks, or belongs to another model.
        InputError: its graph is not the model's.
    """
    stored = parsed(path)
    if (read := read_eap_ig_json(path, stored, model)) is not None:
        return {"mask": read.mask, "graph": read.graph}
    own = decoded(path, stored, _FORM, _FIELDS, "a circuit", model)
    with own_errors(path, "Write it anew with to_json.", CheckpointError):
        if ("edges" in own.fields) == ("mask" in own.fields):
            raise ValueError("it needs either edges or a mask")
        mask = own.graph.mask(own.fields["edges"]) if "edges" in own.fields else own.fields["mask"]
    axes = tuple(own.fields["axes"])
    return {"mask": mask, "graph": own.graph, "axis_names": axes, "name": own.fields["name"]}


def read_circuit_pt(path: str | os.PathLike[str], model: Any) -> dict[str, Any]:
    """Reads EAP-IG's ``.pt``, likewise."""
    read = read_eap_ig_pt(path, model)
    return {"mask": read.mask, "graph": read.graph}
