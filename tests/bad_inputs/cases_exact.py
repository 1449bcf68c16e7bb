"""Exact effects of edges, their verification, and ACDC."""

import functools
from typing import Any

import numpy as np
from table import Case, World

from tljax import HookedTransformer
from tljax.circuits import EdgeScores, ResidualGraph, edge_scores
from tljax.circuits.scores.verification import verify_edges
from tljax.circuits.search.acdc import acdc
from tljax.errors import InputError
from tljax.patching import LogitDiff

TOKENS, OTHERS = [[1, 2, 3, 4]], [[5, 6, 7, 8]]
DIFF = LogitDiff(1, 2)


@functools.cache
def model(n_layers: int = 1) -> HookedTransformer:
    return HookedTransformer(World.config(n_layers=n_layers, seed=2))


def graph(n_layers: int = 1) -> ResidualGraph:
    return ResidualGraph.of(model(n_layers))


def exact(edges: Any = None, metric: Any = DIFF, source: Any = OTHERS, **options: Any) -> EdgeScores:
    return edge_scores(model(), TOKENS, source, metric, "exact", edges=edges, progress=False, **options)


def searched(metric: Any = None, **options: Any) -> Any:
    return acdc(model(), TOKENS, OTHERS, metric, **({"tau": 0.1, "progress": False} | options)).circuit.mask


def verified(source: Any = OTHERS, **options: Any) -> Any:
    estimate = edge_scores(model(), TOKENS, OTHERS, DIFF, progress=False)
    return verify_edges(model(), TOKENS, source, DIFF, estimate, progress=False, **options)


def not_a_number(logits: Any) -> Any:
    return logits[:, -1, 1] * np.nan


CASES = [
    Case("a mask with pairs that are no edges", lambda w: exact(np.ones(graph().shape, bool)), InputError,
         "no edges", "& graph.edges"),
    Case("a mask of numbers", lambda w: exact(graph().edges.astype(float)), InputError, "boolean mask", "float64"),
    Case("a mask of another model's graph", lambda w: exact(graph(2).edges), InputError,
         "boolean mask", str(graph().shape)),
    Case("a mask without edges", lambda w: exact(graph().mask()), InputError, "no edge"),
    Case("the graph of another model", lambda w: exact(graph=graph(2)), InputError, "another model", "n_layers=2"),
    Case("exact effects by position", lambda w: exact(axes=("pos",)), InputError, "all positions"),
    Case("edges for an estimate", lambda w: edge_scores(model(), TOKENS, OTHERS, DIFF, "eap", edges=graph().edges),
         InputError, "exact", "'eap'"),
    Case("a metric of every position", lambda w: exact(metric=lambda logits: logits[:, :, 1]), InputError, "[batch]"),
    Case("a metric that is NaN", lambda w: exact(metric=not_a_number), InputError, "finite"),
    Case("the source is the prompt", lambda w: exact(source=TOKENS), InputError, "equals the base run"),
    Case("an edge alone is worth what it is among all", lambda w: exact(graph().mask(["m0->logits"]))["m0->logits"],
         equals=lambda w: exact()["m0->logits"]),
    Case("tau below zero", lambda w: searched(tau=-0.1), InputError, "tau=-0.1", "from 0 on"),
    Case("tau is NaN", lambda w: searched(tau=float("nan")), InputError, "tau=nan"),
    Case("ACDC does not say which change counts", lambda w: searched(DIFF), InputError, 'by="lowers"', "LogitDiff"),
    Case("ACDC keeps what lowers the divergence", lambda w: searched(by="lowers"), InputError, "rises"),
    Case("ACDC with a metric that is NaN", lambda w: searched(not_a_number, by="raises"), InputError, "nan"),
    Case("ACDC on another model's graph", lambda w: searched(graph=graph(2)), InputError, "another model"),
    Case("a high tau keeps nothing", lambda w: searched(tau=1e9).sum(), equals=0),
    Case("a tau of zero keeps every edge that changes the metric at all by size",
         lambda w: searched(DIFF, tau=0.0, by="absolute").sum(), equals=lambda w: graph().n_edges),
    Case("more edges to verify than there are", lambda w: verified(verify=10_000), InputError, "10000"),
    Case("scores of another ablation", lambda w: verified(ablation="zero"), InputError, "'patching'", "'zero'"),
    Case("information flow is no effect",
         lambda w: verify_edges(model(), TOKENS, OTHERS, DIFF, edge_scores(model(), TOKENS, method="information-flow")),
         InputError, "no metric"),
]  # fmt: skip
