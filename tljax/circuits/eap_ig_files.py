"""Files of EAP-IG (hannamw/EAP-IG, the MIB circuit track): graphs with scores and a circuit, as JSON or ``.pt``.

Their graph counts key and value heads by query head: of a grouped-query model it is that of
``model.set_ungroup_grouped_query_attention(True)``. Scores are those of a *loss*: positive where patching raises the
loss, that is, lowers the metric.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tljax.circuits.graph import ResidualGraph
from tljax.circuits.selection import reads_of
from tljax.errors import CheckpointError, InputError, UnsupportedModelError, nearest
from tljax.safetensors_files import own_errors, replace_file
from tljax.schema import mismatch

_CFG = {"n_layers": int, "n_heads": int, "parallel_attn_mlp": bool, "d_model": int}
_REMEDY = "Write it anew with EAP-IG's Graph.to_json or to_pt."
_NODE = {"in_graph": bool, "score?": float, "neurons?": list, "neurons_scores?": list}
_EDGE = {"in_graph": bool, "score": float}
_TENSORS = ("edges_scores", "edges_in_graph", "nodes_in_graph")
_MORE_TENSORS = ("nodes_scores", "neurons_in_graph", "neurons_scores")


@dataclasses.dataclass(frozen=True, eq=False)
class EAPIGGraph:
    """What a file of EAP-IG holds.

    Attributes:
        graph: the graph, with a key and a value reader for each query head.
        mask: the circuit, ``[writer, reader]``.
        scores: scores of edges as stored, ``[writer, reader]``: of the loss.
        nodes: which writers are in the circuit, ``[writer]``.
        node_scores: ``[writer]``, NaN for a writer without one; ``None`` if there are none.
        neurons: which output coordinates of each writer are in the circuit, ``[writer, d_model]``, or ``None``.
        neuron_scores: the same shape, or ``None``.
    """

    graph: ResidualGraph
    mask: np.ndarray
    scores: np.ndarray
    nodes: np.ndarray
    node_scores: np.ndarray | None = None
    neurons: np.ndarray | None = None
    neuron_scores: np.ndarray | None = None

    @classmethod
    def of(cls, graph: ResidualGraph, mask: Any, scores: Any = None) -> "EAPIGGraph":
        """Makes the content of a file from a circuit and scores.

        Args:
            graph: the graph. A circuit of a grouped-query model gets each key and value edge once for each query head.
            mask: ``[writer, reader]``.
            scores: scores in EAP-IG's sign, ``[writer, reader]``; zero by default.

        Raises:
            InputError: a graph that EAP-IG lacks: attention only, or with experts apart; a mask that is soft or a
                stack; or scores of grouped heads.
        """
        if graph.attn_only or graph.experts:
            what = "experts as writers" if graph.experts else "layers without an MLP"
            raise InputError(f'EAP-IG\'s files know no {what}: write layout="tljax".')
        mask = np.asarray(mask)
        if mask.shape != graph.shape or not np.isin(mask, (0, 1)).all():
            raise InputError(f"EAP-IG's files hold one circuit of 0 and 1, {graph.shape}; got shape {mask.shape}.")
        if graph.n_kv_heads != graph.n_heads:
            if scores is not None:
                raise InputError(
                    "EAP-IG counts key and value heads by query head, and scores of grouped heads cannot be split: "
                    "compute them on model.set_ungroup_grouped_query_attention(True)."
                )
            mask, graph = graph.ungroup(mask), graph.ungrouped
        mask = mask.astype(bool) & graph.edges
        entered = (mask.any(axis=0) @ reads_of(graph).T) | (np.arange(graph.n_writers) == 0)
        stored = np.zeros(graph.shape) if scores is None else np.where(graph.edges, np.asarray(scores), 0)
        if not np.isfinite(stored).all():
            raise InputError("Some scores are not finite numbers, and a file with them could not be read again.")
        return cls(graph, mask, stored, mask.any(axis=1) & entered)


def write_eap_ig_json(path: str | os.PathLike[str], content: EAPIGGraph) -> None:
    """Writes a file that EAP-IG's ``Graph.from_json`` reads."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as stream:
        stream.write(json.dumps(_json_of(content)).encode())


def write_eap_ig_pt(path: str | os.PathLike[str], content: EAPIGGraph) -> None:
    """Writes a file that EAP-IG's ``Graph.from_pt`` reads; this needs torch.

    Raises:
        UnsupportedModelError: torch is not installed.
    """
    _need_torch("Writing")
    import torch

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        name: torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
        for name, value in _pt_of(content).items()
    }
    with replace_file(path) as stream:
        torch.save(saved, stream)


def read_eap_ig_json(path: str | os.PathLike[str], stored: Any, model: Any = None) -> EAPIGGraph | None:
    """Reads the JSON value of a file that EAP-IG wrote.

    Args:
        path: the file, for errors.
        stored: its value.
        model: the model that its graph must be of, if any.

    Returns:
        What it holds; ``None`` if it is no file of EAP-IG.

    Raises:
        CheckpointError: it is incomplete or damaged.
        InputError: its graph is not the model's.
    """
    if not isinstance(stored, dict) or "cfg" not in stored:
        return None
    with own_errors(path, _REMEDY, CheckpointError):
        content = content_of_json(stored)
    return _of_model(content, model)


def read_eap_ig_pt(path: str | os.PathLike[str], model: Any = None) -> EAPIGGraph:
    """Reads a ``.pt`` that EAP-IG wrote; this needs torch, and no code in it runs.

    Raises:
        CheckpointError: the file is missing, incomplete, damaged, or not of this kind.
        UnsupportedModelError: torch is not installed.
        InputError: its graph is not the model's.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    return _of_model(_read_pt(path), model)


def _of_model(content: EAPIGGraph, model: Any) -> EAPIGGraph:
    if model is not None:
        content.graph.check(model.cfg)
    return content


def content_of_json(stored: Any) -> EAPIGGraph:
    """Reads the JSON value of an EAP-IG file.

    Raises:
        ValueError: it is not one.
    """
    if problem := mismatch(stored, {"cfg": dict, "nodes": {str: dict}, "edges": {str: _EDGE}}):
        raise ValueError(problem)
    graph = _graph_of(stored["cfg"], len(stored["nodes"]) - 1)
    writers = list(graph.writer_numbers)
    _check_names([*writers, "logits"], stored["nodes"], "node")
    names = [graph.edge_name(*edge) for edge in edges_in_order(graph)]
    _check_names(names, stored["edges"], "edge")
    mask, scores = np.zeros(graph.shape, bool), np.zeros(graph.shape)
    for name, edge in zip(names, edges_in_order(graph), strict=True):
        mask[edge], scores[edge] = stored["edges"][name]["in_graph"], stored["edges"][name]["score"]
    rows = [stored["nodes"][name] for name in writers]
    for name, row in stored["nodes"].items():
        checked = {key: value for key, value in row.items() if not _is_nan(value)}  # the score of a node without one
        if problem := mismatch(checked, _NODE, f"node {name}"):
            raise ValueError(problem)
    return EAPIGGraph(
        graph, mask, scores, np.asarray([row["in_graph"] for row in rows], bool),
        _column(rows, "score", (), graph), _column(rows, "neurons", (graph.d_model,), graph, bool),
        _column(rows, "neurons_scores", (graph.d_model,), graph),
    )  # fmt: skip


def edges_in_order(graph: ResidualGraph) -> Iterator[tuple[int, int]]:
    """Yields writer and reader of each edge in the order of EAP-IG's files."""
    for layer in range(graph.n_layers):
        first, mlp = graph.writers_of(layer).start, graph.readers_of(layer, "mlp").start
        starts = [graph.readers_of(layer, kind).start for kind in ("q", "k", "v")]
        for writer in range(first):
            yield from ((writer, start + head) for head in range(graph.n_heads) for start in starts)
            if graph.parallel_attn_mlp:
                yield writer, mlp
        if not graph.parallel_attn_mlp:
            yield from ((writer, mlp) for writer in range(first + graph.n_heads))
    yield from ((writer, graph.n_readers - 1) for writer in range(graph.n_writers))


def _json_of(content: EAPIGGraph) -> dict[str, Any]:
    graph, nodes = content.graph, {}
    for number, writer in enumerate(graph.writers):
        row: dict[str, Any] = {"in_graph": bool(content.nodes[number])}
        if content.node_scores is not None:
            row["score"] = float(content.node_scores[number])
        if content.neurons is not None:
            row["neurons"] = content.neurons[number].tolist()
        if content.neuron_scores is not None:
            row["neurons_scores"] = content.neuron_scores[number].tolist()
        nodes[writer.name] = row
    nodes["logits"] = {"in_graph": True}
    edges = {
        graph.edge_name(*edge): {"score": float(content.scores[edge]), "in_graph": bool(content.mask[edge])}
        for edge in edges_in_order(graph)
    }
    return {"cfg": _cfg_of(graph), "nodes": nodes, "edges": edges}


def _pt_of(content: EAPIGGraph) -> dict[str, Any]:
    graph = content.graph
    arrays = {
        "edges_scores": content.scores, "edges_in_graph": content.mask, "nodes_in_graph": content.nodes,
        "nodes_scores": content.node_scores, "neurons_in_graph": content.neurons,
        "neurons_scores": content.neuron_scores,
    }  # fmt: skip
    names = {"src_nodes": list(graph.writer_numbers), "dst_nodes": list(graph.reader_numbers)}
    return {"cfg": _cfg_of(graph), **names, **{name: array for name, array in arrays.items() if array is not None}}


def _read_pt(path: Path) -> EAPIGGraph:
    _need_torch("Reading")
    import torch

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to its own pickle errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no file of torch's, or is damaged ({reason}). {_REMEDY}") from error
    with own_errors(path, _REMEDY, CheckpointError):
        lists = {"cfg": dict, "src_nodes": [str], "dst_nodes": [str]}
        if not isinstance(stored, Mapping):
            raise ValueError("it holds no dictionary")
        if problem := mismatch({name: stored[name] for name in lists if name in stored}, lists):
            raise ValueError(problem)
        graph = _graph_of(stored["cfg"], len(stored["src_nodes"]))
        for name, own in (("src_nodes", graph.writer_numbers), ("dst_nodes", graph.reader_numbers)):
            _check_names(list(own), dict.fromkeys(stored[name]), "node")
            if stored[name] != list(own):
                raise ValueError(f"its {name} are in another order than the graph's")
        shapes = {
            **dict.fromkeys(_TENSORS[:2], graph.shape), "nodes_in_graph": (graph.n_writers,),
            "nodes_scores": (graph.n_writers,), **dict.fromkeys(_MORE_TENSORS[1:], (graph.n_writers, graph.d_model)),
        }  # fmt: skip
        arrays: dict[str, Any] = dict.fromkeys(_MORE_TENSORS)
        for name in (*_TENSORS, *(name for name in _MORE_TENSORS if stored.get(name) is not None)):
            if name not in stored:
                raise ValueError(f"it lacks {name!r}")
            if not isinstance(stored[name], torch.Tensor) or tuple(stored[name].shape) != shapes[name]:
                raise ValueError(f"{name} is no tensor of shape {shapes[name]}")
            dtype = torch.bool if "in_graph" in name else torch.float64
            arrays[name] = stored[name].to(dtype).numpy()
        scores = np.where(graph.edges, arrays["edges_scores"], 0)
        if not np.isfinite(scores).all():
            raise ValueError(f"the score of {graph.edge_name(*np.argwhere(~np.isfinite(scores))[0])} is not finite")
    return EAPIGGraph(
        graph, arrays["edges_in_graph"] & graph.edges, scores, arrays["nodes_in_graph"], arrays["nodes_scores"],
        arrays["neurons_in_graph"], arrays["neurons_scores"],
    )  # fmt: skip


def _graph_of(cfg: Mapping[str, Any], n_writers: int) -> ResidualGraph:
    """Returns the graph of a file's ``cfg``, whose size must fit the number of writers before it is built."""
    if problem := mismatch({name: cfg[name] for name in _CFG if name in cfg}, _CFG, "its cfg"):
        raise ValueError(problem)
    layers, heads, width = cfg["n_layers"], cfg["n_heads"], cfg["d_model"]
    if min(layers, heads, width) < 1 or 1 + layers * (heads + 1) != n_writers:
        raise ValueError(
            f"its cfg has {layers} layers of {heads} heads, which makes {1 + layers * (heads + 1)} nodes besides the "
            f"logits, and it has {n_writers}"
        )
    return ResidualGraph(layers, heads, heads, width, parallel_attn_mlp=cfg["parallel_attn_mlp"])


def _cfg_of(graph: ResidualGraph) -> dict[str, Any]:
    return {name: getattr(graph, name) for name in _CFG}


def _check_names(expected: list[str], found: Mapping[str, Any], what: str) -> None:
    known = set(expected)
    if unknown := [name for name in found if name not in known]:
        raise ValueError(f"its graph has no {what} {unknown[0]!r}.{nearest(unknown[0], expected)}")
    if absent := [name for name in expected if name not in found]:
        raise ValueError(f"it lacks the {what} {absent[0]!r}")


def _column(rows: list[Any], key: str, shape: tuple[int, ...], graph: ResidualGraph, dtype: Any = float) -> Any:
    """Returns an entry of every node as an array, ``None`` if none has it; NaN where a node lacks a score."""
    if not any(key in row for row in rows):
        return None
    column = np.full((graph.n_writers, *shape), True if dtype is bool else math.nan, dtype)
    for number, row in enumerate(rows):
        if key in row:
            value = np.asarray(row[key], float)
            if value.shape != shape:
                raise ValueError(f"{key} of node {graph.writers[number].name} is not of shape {shape}")
            column[number] = value
    return column


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _need_torch(doing: str) -> None:
    if find_spec("torch") is None:
        raise UnsupportedModelError(f"{doing} a .pt file needs torch, which is not installed. Use JSON: path.json.")
