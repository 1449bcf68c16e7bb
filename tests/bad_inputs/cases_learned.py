"""Learning circuits and drawing them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from table import Case, World

from tljax import Zero
from tljax.circuits import ResidualGraph, draw_circuit, learn_circuit, optimal_constants, plot_edge_matrix
from tljax.circuits.writers import writer_points
from tljax.errors import InputError, TrainingError
from tljax.patching import LogitDiff

BASE, OTHER = np.asarray([[1, 2, 3], [4, 5, 6]]), np.asarray([[1, 7, 3], [4, 8, 6]])
GRAPH = ResidualGraph(1, 2, 2, 8)
EDGES = GRAPH.edges.astype(float)


def _learn(w: World, *source: Any, model: Any = None, prompts: Any = BASE, **options: Any) -> Any:
    source = source or (OTHER,)
    return learn_circuit(model or w.small, prompts, *source, **({"steps": 1, "progress": False} | options))


def _scaled(w: World, factor: float) -> Any:
    return w.small.replace(params=jax.tree.map(lambda leaf: leaf * factor, w.small.params))


def _wide(w: World) -> dict[str, np.ndarray]:
    return {name: np.zeros(9 if name == "hook_embed" else ()) for name in writer_points(GRAPH)}


def _right(logits: Any) -> Any:
    return (logits[:, -1].argmax(axis=-1) == 3).astype(jnp.float32)


CASES: tuple[Case, ...] = (
    Case("a target of all edges", lambda w: _learn(w, target=1.0), InputError, "target=1.0", "less than 1"),
    Case("a target in per cent", lambda w: _learn(w, target=95), InputError, "target=95"),
    Case("no steps", lambda w: _learn(w, steps=0), InputError, "steps=0", "at least 1"),
    Case("another method's target", lambda w: _learn(w, method="ugs", target=0.9), InputError, "target=", "penalty="),
    Case("a method misspelt", lambda w: _learn(w, method="edge-pruning"), InputError, "Did you mean 'edge_pruning'"),
    Case("an ablation misspelt", lambda w: _learn(w, ablation="means"), InputError, "Did you mean 'mean'"),
    Case(
        "lists that do not match", lambda w: _learn(w, seed=[0, 1], target=[0.5, 0.6, 0.7]), InputError, "2 of seed",
        "3 of target",
    ),
    Case("no source", lambda w: learn_circuit(w.small, BASE, steps=1), InputError, "source="),
    Case("the source is the prompts", lambda w: _learn(w, BASE), InputError, "Is the source the same"),
    Case("a source of another length", lambda w: _learn(w, OTHER[:, :2]), InputError, "its source 2", "align="),
    Case("fewer sources than prompts", lambda w: _learn(w, OTHER[:1]), InputError, "2 prompts and 1 source"),
    Case("an alignment past the source", lambda w: _learn(w, align=np.full((2, 3), 3)), InputError, "align="),
    Case("accuracy as a metric", lambda w: _learn(w, OTHER, _right), InputError, "gradient of zero"),
    Case(
        "a metric of NumPy", lambda w: _learn(w, OTHER, lambda logits: np.asarray(logits)[:, -1, 0]), InputError,
        "cannot be differentiated",
    ),
    Case(
        "a function of prompts in batches", lambda w: _learn(w, OTHER, lambda x: x[:, -1, 0], batch_size=1), InputError,
        "batch_size=2",
    ),
    Case("raising no metric", lambda w: _learn(w, objective="raise"), InputError, "metric="),
    Case("a learning rate of zero", lambda w: _learn(w, learning_rate=0.0), InputError, "learning_rate=0.0"),
    Case("weights that are NaN", lambda w: _learn(w, model=_scaled(w, np.nan)), TrainingError, "nan"),
    Case(
        "a rate that overflows", lambda w: _learn(
            w, OTHER, LogitDiff(3, 4), objective="raise", method="ugs", learning_rate=1e38, penalty=1e38, steps=60,
        ), TrainingError, "Lower learning_rate",
    ),
    Case("a model with hooks", lambda w: _learn(w, model=w.small.add_hook("hook_embed", Zero())), InputError, "hooks"),
    Case("another model's graph", lambda w: _learn(w, graph=ResidualGraph(2, 2, 2, 8)), InputError, "another model"),
    Case("constants of another width", lambda w: _learn(w, None, ablation=_wide(w)), InputError, "hook_embed", "(9,)"),
    Case("constants of one point", lambda w: _learn(w, None, ablation={"hook_embed": 0.0}), InputError, "writer_po"),
    Case("constants of no edge", lambda w: optimal_constants(w.small, BASE, GRAPH.edges), InputError, "every edge"),
    Case("a mask of another graph", lambda w: optimal_constants(w.small, BASE, np.ones((3, 3))), InputError, "(4, 8)"),
    Case("a picture of nothing", lambda w: draw_circuit(GRAPH, 0 * EDGES), InputError, "no edge"),
    Case("a picture of a stack", lambda w: draw_circuit(GRAPH, EDGES[None]), InputError, "mask[0]"),
    Case("NaN drawn", lambda w: draw_circuit(GRAPH, EDGES, EDGES * np.nan), InputError, "scores holds nan at input->"),
    Case("the strongest of no scores", lambda w: draw_circuit(GRAPH, EDGES, k=2), InputError, "scores="),
    Case(
        "too many edges", lambda w: draw_circuit(ResidualGraph(12, 12, 12, 8), np.ones((157, 445))), InputError,
        "32491 edges", "k=300",
    ),
    Case("a matrix on its side", lambda w: plot_edge_matrix(EDGES.T, GRAPH), InputError, "(8, 4)", "(4, 8)"),
)  # fmt: skip
