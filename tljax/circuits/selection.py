"""Which edges make a circuit: by threshold, the best n, or greedily from the logits; and pruning of what hangs loose.

Scores are effects, patched minus baseline. ``by="lowers"`` prefers edges whose patching lowers the metric most, the
signed selection of EAP-IG (Hanna et al. 2024), whose scores are of the loss; ``"raises"`` those that raise it;
``"absolute"`` either. All functions work on NumPy arrays ``[writer, reader]``.
"""

import functools
import heapq
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import check_type, is_traced, typed, whole
from tljax.circuits.graph import ResidualGraph
from tljax.errors import InputError

By = Literal["absolute", "lowers", "raises"]


def read_scores(scores: Any, graph: ResidualGraph) -> np.ndarray:
    """Returns scores of edges as float64 ``[..., writer, reader]``, zero where there is no edge.

    Raises:
        InputError: they are traced, of another shape, or not finite at an edge.
    """
    if is_traced(scores):
        raise InputError("Edges are chosen outside jax.jit: which ones there are must be known. Use soft masks inside.")
    array = np.asarray(scores, np.float64)
    if array.shape[-2:] != graph.shape:
        raise InputError(
            f"The scores have shape {array.shape}; this graph has {graph.n_writers} writers and {graph.n_readers} "
            "readers, so give [..., writer, reader]. (Prompts and positions are averaged or summed first.)"
        )
    array = np.where(graph.edges, array, 0.0)
    if not np.isfinite(array).all():
        writer, reader = (int(n) for n in np.argwhere(~np.isfinite(array))[0][-2:])
        raise InputError(
            f"The score of {graph.edge_name(writer, reader)} is {array[~np.isfinite(array)][0]}: a circuit cannot be "
            "chosen by such scores. Look for prompts whose metric is not finite."
        )
    return array


def read_mask(mask: Any, graph: ResidualGraph) -> Any:
    """Returns a mask ``[..., writer, reader]`` as booleans or numbers, zero where there is no edge.

    Raises:
        InputError: it is of another shape, or holds what is no mask.
    """
    array = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if array.shape[-2:] != graph.shape or array.ndim < 2:
        raise InputError(
            f"The mask has shape {tuple(array.shape)}; this graph has {graph.n_writers} writers and {graph.n_readers} "
            "readers, so give [..., writer, reader]. Is it the mask of another model?"
        )
    if is_traced(array):
        return array * jnp.asarray(graph.edges, array.dtype)
    if array.dtype == bool:
        return array & graph.edges
    numeric = array.dtype.kind in "iu" or jnp.issubdtype(array.dtype, jnp.floating)
    known = np.where(graph.edges, np.asarray(array), np.zeros((), array.dtype)) if numeric else np.asarray(array)
    if array.dtype.kind in "iu" and np.isin(known, (0, 1)).all():
        return known.astype(bool)
    if not numeric or array.dtype.kind in "iu" or not np.isfinite(known.astype(np.float64)).all():
        raise InputError(
            f"The mask has dtype {array.dtype}: give booleans, or finite numbers from 0 (absent) to 1 (present)."
        )
    return known if isinstance(array, np.ndarray) else jnp.asarray(known)


def ranked(scores: np.ndarray, by: By) -> np.ndarray:
    """Returns numbers that are larger for edges to prefer."""
    check_type(by, By, "by")
    return {"absolute": np.abs(scores), "lowers": -scores, "raises": scores}[by]


def above(scores: np.ndarray, graph: ResidualGraph, threshold: float, by: By = "absolute") -> np.ndarray:
    """Returns the mask of edges whose score is at least ``threshold`` in size, or in the direction of ``by``."""
    if not np.isfinite(threshold):
        raise InputError(f"threshold={threshold} must be a number: edges scored at least as high are kept.")
    return graph.edges & (ranked(scores, by) >= threshold)


def top(scores: np.ndarray, graph: ResidualGraph, n: int, by: By = "absolute") -> np.ndarray:
    """Returns the mask of the ``n`` best edges; of equals, the earlier writer's (then the earlier reader's)."""
    n = whole(n, "top", at_least=0, at_most=graph.n_edges)
    edges = np.flatnonzero(graph.edges)
    order = np.argsort(-ranked(scores, by).ravel()[edges], kind="stable")
    mask = np.zeros(graph.shape, bool)
    mask.ravel()[edges[order[:n]]] = True
    return mask


def greedy(scores: np.ndarray, graph: ResidualGraph, n: int, by: By = "absolute") -> np.ndarray:
    """Returns the mask of ``n`` edges found from the logits up.

    The best edge among those that lead to a part of the circuit is taken, again and again; at first that is the logits
    alone, and a writer that an edge comes from joins it with all that it reads.
    """
    n = whole(n, "top", at_least=0, at_most=graph.n_edges)
    values, reads = ranked(scores, by), reads_of(graph)
    mask, joined = np.zeros(graph.shape, bool), np.zeros(graph.n_readers, bool)
    heap: list[tuple[float, int, int, np.ndarray]] = []
    lists = 0

    def join(readers: np.ndarray) -> None:
        """Makes the edges into these readers candidates, best first; only the best of them enters the heap."""
        nonlocal lists
        new = np.flatnonzero(readers & ~joined)
        joined[new] = True
        writers, columns = np.nonzero(graph.edges[:, new])
        candidates = writers * graph.n_readers + new[columns]
        if candidates.size:
            lists += 1
            order = candidates[np.argsort(-values.ravel()[candidates], kind="stable")]
            heapq.heappush(heap, (-float(values.flat[order[0]]), lists, 0, order))

    join(np.arange(graph.n_readers) == graph.n_readers - 1)
    present = np.zeros(graph.n_writers, bool)
    while n and heap:
        _, which, place, order = heap[0]
        if place + 1 < len(order):
            value = -float(values.flat[order[place + 1]])
            heapq.heapreplace(heap, (value, which, place + 1, order))
        else:
            heapq.heappop(heap)
        edge = int(order[place])
        mask.flat[edge] = True
        n -= 1
        writer = edge // graph.n_readers
        if not present[writer]:
            present[writer] = True
            join(reads[writer])
    return mask


@typed
def top_nodes(
    scores: Any, graph: ResidualGraph, k: int, by: By = "absolute", *, prune: bool = True, whole_rows: bool = False
) -> np.ndarray:
    """Returns the mask of all edges out of the ``k`` best writers.

    Args:
        scores: ``[writer]``.
        graph: the graph.
        k: how many writers; the token embedding is one of them.
        by: what is preferred.
        prune: whether to remove what is on no way from the token embedding to the logits: then only edges between
            chosen writers, and those into the logits, remain.
        whole_rows: whether pruning sees an edge from each chosen writer to every reader, also where the graph has none,
            as in EAP-IG; there a writer can so be kept by edges that do not exist.

    Raises:
        InputError: scores that do not fit or are not finite, or a number out of range.
    """
    values = ranked(np.asarray(scores, np.float64), by)
    if values.shape != (graph.n_writers,) or not np.isfinite(values).all():
        raise InputError(f"Scores of nodes are finite numbers [{graph.n_writers}], one a writer; got {values.shape}.")
    chosen = np.argsort(-values, kind="stable")[: whole(k, "k", at_least=0, at_most=graph.n_writers)]
    rows = np.broadcast_to(np.isin(np.arange(graph.n_writers), chosen)[:, None], graph.shape)
    mask = rows if whole_rows else rows & graph.edges
    return (_pruned(mask, graph) if prune else mask) & graph.edges


def pruned(mask: Any, graph: ResidualGraph) -> np.ndarray:
    """Removes what is on no way from the token embedding to the logits, from a mask or a stack of them.

    Writers without an incoming or an outgoing edge go, and with them their edges, until nothing changes. (The token
    embedding needs no incoming edge.) As in EAP-IG, an edge that enters a writer by its query alone is enough.

    Args:
        mask: ``[..., writer, reader]``; soft masks count an edge as present unless it is zero.
        graph: its graph.
    """
    return _pruned(np.asarray(mask) * graph.edges, graph)


def _pruned(mask: np.ndarray, graph: ResidualGraph) -> np.ndarray:
    reads = reads_of(graph)
    is_input = np.asarray([writer.kind == "input" for writer in graph.writers])
    while True:
        present = mask != 0
        entered = (present.any(axis=-2) @ reads.T) | is_input
        alive = present.any(axis=-1) & entered
        heard = alive @ reads
        heard[..., -1] = True
        kept = mask * (alive[..., :, None] & heard[..., None, :])
        if (kept == mask).all():
            return kept
        mask = kept


@functools.lru_cache(maxsize=64)
def reads_of(graph: ResidualGraph) -> np.ndarray:
    """Returns which readers each writer computes its output from, boolean ``[writer, reader]`` (read-only).

    A head reads by its query and by the key and value of its group, experts by their layer's MLP.
    """
    reads = np.zeros(graph.shape, bool)
    per_group = graph.n_heads // graph.n_kv_heads
    for number, writer in enumerate(graph.writers):
        if writer.kind == "head":
            reads[number, graph.readers_of(writer.layer, "q").start + writer.number] = True
            for kind in ("k", "v"):
                reads[number, graph.readers_of(writer.layer, kind).start + writer.number // per_group] = True
        elif writer.kind != "input":
            reads[number, graph.readers_of(writer.layer, "mlp")] = True
    reads.flags.writeable = False
    return reads


@typed
def select(
    scores: Any,
    graph: ResidualGraph,
    *,
    top: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    by: By = "absolute",
    greedy: bool = False,
    prune: bool = True,
) -> np.ndarray:
    """Returns the mask of the edges to keep, by exactly one of three sizes.

    Args:
        scores: ``[..., writer, reader]``; leading axes give a stack of masks.
        graph: the graph.
        top: how many edges.
        fraction: which share of all edges, in (0, 1]; rounded down to a whole number of edges.
        threshold: the least score.
        by: what is preferred: large effects, or those that lower or raise the metric.
        greedy: whether edges are found from the logits up.
        prune: whether to remove what is on no way from the token embedding to the logits.

    Raises:
        InputError: none or several of the sizes, one that is out of range, or scores that do not fit.
    """
    if sum(size is not None for size in (top, fraction, threshold)) != 1:
        raise InputError("Give one size of the circuit: top= (edges), fraction= (of all edges) or threshold=.")
    if greedy and threshold is not None:
        raise InputError("greedy=True takes edges one by one: give top= or fraction=, not threshold=.")
    n = edges_in(fraction, graph) if fraction is not None else top
    array = read_scores(scores, graph)
    masks = [_one(each, graph, n, threshold, by, greedy) for each in array.reshape(-1, *graph.shape)]
    chosen = np.stack(masks).reshape(array.shape) if masks else np.zeros(array.shape, bool)
    return pruned(chosen, graph) if prune else chosen


def _one(
    scores: np.ndarray, graph: ResidualGraph, n: int | None, threshold: float | None, by: By, greedily: bool
) -> np.ndarray:
    if n is None:
        assert threshold is not None
        return above(scores, graph, threshold, by)
    return (greedy if greedily else top)(scores, graph, n, by)


def edges_in(fraction: float, graph: ResidualGraph) -> int:
    """Returns how many edges a share of all edges is, rounded down.

    Raises:
        InputError: a share outside (0, 1].
    """
    if not 0 < fraction <= 1:
        hint = f" For {fraction} % give {fraction / 100:g}." if 1 < fraction <= 100 else ""
        raise InputError(f"fraction={fraction} is a share of the {graph.n_edges} edges, above 0 and up to 1.{hint}")
    return int(fraction * graph.n_edges)
