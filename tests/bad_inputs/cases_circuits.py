"""Circuits that are not the graph's, sizes that are no sizes, and runs in which there is nothing to explain."""

import functools
from typing import Any

import numpy as np
from table import Case, World

import tljax
from tljax.circuits import (
    Circuit,
    ResidualGraph,
    completeness,
    faithfulness,
    faithfulness_curve,
    mean_activations,
    minimality,
    select,
    stability,
)
from tljax.errors import InputError
from tljax.patching import LogitDiff


@functools.cache
def graph(w: World) -> ResidualGraph:
    return ResidualGraph.of(w.tiny)


def scores(w: World, **at: float) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=graph(w).shape)
    for name, value in at.items():
        values[graph(w).edge(name.replace("_to_", "->"))] = value
    return values


def full(w: World) -> Circuit:
    return Circuit.full(graph(w))


def curve(w: World, *fractions: float) -> Any:
    return faithfulness_curve(w.tiny, scores(w), w.P, w.Q, w.m, fractions=fractions)


def hooked(w: World) -> Any:
    return full(w).run(w.tiny.add_hook("blocks.0.hook_resid_pre", tljax.Zero()), w.P, w.Q)


CASES: tuple[Case, ...] = (
    Case(
        "an edge that the graph lacks", lambda w: Circuit.of(w.tiny, ["a3.h0->m1"]), InputError, "does not come after"
    ),
    Case("a misspelt edge", lambda w: Circuit.of(w.tiny, ["a0.h0->a1.h0<p>"]), InputError, "Did you mean", "a1.h0<q>"),
    Case("one edge, not in a list", lambda w: Circuit.of(w.tiny, "input->m0"), InputError, "['input->m0']"),
    Case(
        "a mask of another model",
        lambda w: Circuit(np.ones((3, 5), bool), graph(w)),
        InputError,
        "(3, 5)",
        "another model",
    ),
    Case("a mask of words", lambda w: Circuit(np.full(graph(w).shape, "yes"), graph(w)), InputError, "booleans"),
    Case("a mask of counts", lambda w: Circuit(np.full(graph(w).shape, 2), graph(w)), InputError, "from 0", "to 1"),
    Case("a soft mask with NaN", lambda w: Circuit(scores(w, input_to_m0=np.nan), graph(w)), InputError, "finite"),
    Case(
        "axes of a stack without names",
        lambda w: Circuit(np.ones((2, 3, *graph(w).shape), bool), graph(w)),
        InputError,
        "a different name for each axis",
    ),
    Case("a circuit on another model", lambda w: full(w).run(w.small, [[1, 2]], [[1, 3]]), InputError, "n_layers=4"),
    Case("a model with hooks", hooked, InputError, "reset_hooks"),
    Case("names of a stack", lambda w: Circuit.stack([full(w)] * 2).names(), InputError, "circuit[0]"),
    Case("circuits of two graphs", lambda w: full(w).jaccard(Circuit.full(w.small)), InputError, "same graph"),
    Case("no source", lambda w: full(w).run(w.tiny, w.P), InputError, "needs source="),
    Case(
        "prompts of other lengths",
        lambda w: full(w).run(w.tiny, w.P, w.S),
        InputError,
        "its source 5",
        "tljax.text.align",
    ),
    Case(
        "an alignment of another shape",
        lambda w: full(w).run(w.tiny, w.P, w.S, align=np.zeros((1, 3), int)),
        InputError,
        "align= has shape (1, 3)",
    ),
    Case(
        "an alignment past the source's end",
        lambda w: full(w).run(w.tiny, w.P, w.S, align=np.full((1, w.tiny.to_tokens(w.P).shape[1]), 5)),
        InputError,
        "no token of source prompt 0",
    ),
    Case(
        "an alignment with zeros",
        lambda w: full(w).run(w.tiny, w.P, w.Q, ablation="zero", align=np.zeros((1, 14), int)),
        InputError,
        'ablation="patching"',
    ),
    Case("two prompts, one source", lambda w: full(w).run(w.tiny, [w.P, w.Q], w.Q), InputError, "2 base prompts and 1"),
    Case(
        "an unknown ablation", lambda w: full(w).run(w.tiny, w.P, w.Q, ablation="means"), InputError, "ablation='means'"
    ),
    Case(
        "means by position of shorter prompts",
        lambda w: full(w).run(w.tiny, w.P, w.S, ablation="positional_mean"),
        InputError,
        "no mean for position 5",
    ),
    Case(
        "means of prompts of another length",
        lambda w: full(w).run(w.tiny, w.P, [w.S, w.Q], ablation="mean", metric=w.m),
        equals=lambda w: w.m(w.tiny(w.P)),
    ),
    Case(
        "means of padded prompts",
        lambda w: mean_activations(w.tiny, w.tiny.to_batch([w.P, w.S]))["hook_embed"],
        equals=lambda w: sum(np.asarray(mean_activations(w.tiny, one)["hook_embed"]) for one in (w.P, w.S)) / 2,
    ),
    Case(
        "constants for points that are no writers",
        lambda w: full(w).run(w.tiny, w.P, ablation={"blocks.0.hook_resid_pre": np.zeros(64)}),
        InputError,
        "no hook point of this graph's writers",
    ),
    Case(
        "constants of another width",
        lambda w: full(w).run(w.tiny, w.P, ablation={n: np.zeros(7) for n in mean_activations(w.tiny, w.P)}),
        InputError,
        "does not broadcast",
    ),
    Case(
        "a mask for each of other prompts",
        lambda w: Circuit(np.ones((3, *graph(w).shape), bool), graph(w), ("batch",)).run(w.tiny, w.P, w.Q),
        InputError,
        "each of 3 prompts",
    ),
    Case("no size", lambda w: select(scores(w), graph(w)), InputError, "Give one size"),
    Case("two sizes", lambda w: select(scores(w), graph(w), top=3, fraction=0.1), InputError, "Give one size"),
    Case("a percentage", lambda w: select(scores(w), graph(w), fraction=5), InputError, "For 5 % give 0.05"),
    Case("a fraction of zero", lambda w: curve(w, 0.0, 0.5), InputError, "above 0"),
    Case("fractions that fall", lambda w: curve(w, 0.5, 0.1), InputError, "increasing"),
    Case("no fractions", lambda w: curve(w), InputError, "increasing"),
    Case("more edges than there are", lambda w: select(scores(w), graph(w), top=10**6), InputError, "out of range"),
    Case("greedy by threshold", lambda w: select(scores(w), graph(w), threshold=1.0, greedy=True), InputError, "top="),
    Case("signed", lambda w: select(scores(w), graph(w), top=3, by="signed"), InputError, "'lowers'"),  # type: ignore[arg-type]
    Case(
        "scores that are NaN",
        lambda w: select(scores(w, input_to_m0=np.nan), graph(w), top=3),
        InputError,
        "input->m0 is nan",
    ),
    Case("scores of another graph", lambda w: select(np.ones((3, 5)), graph(w), top=3), InputError, "(3, 5)"),
    Case("stability of one prompt", lambda w: stability(scores(w)[None], graph(w), top=3), InputError, "at least two"),
    Case("stability of a mean", lambda w: stability(scores(w), graph(w), top=3), InputError, "[batch, writer, reader]"),
    Case(
        "the same prompt twice",
        lambda w: faithfulness(w.tiny, full(w), w.P, w.P, w.m),
        InputError,
        "nothing that a circuit could carry",
    ),
    Case(
        "the minimality of nothing",
        lambda w: minimality(w.tiny, Circuit.empty(graph(w)), w.P, w.Q, w.m),
        InputError,
        "no edges to leave out",
    ),
    Case(
        "an edge that the circuit lacks",
        lambda w: minimality(w.tiny, Circuit.empty(graph(w)), w.P, w.Q, w.m, ["input->m0"]),
        InputError,
        "lacks the edge 'input->m0'",
    ),
    Case(
        "edges to leave out by a misspelt word",
        lambda w: minimality(w.tiny, full(w), w.P, w.Q, w.m, "class"),
        InputError,
        '"classes"',
    ),
    Case(
        "the minimality of a stack",
        lambda w: minimality(w.tiny, Circuit.stack([full(w), full(w)]), w.P, w.Q, w.m),
        InputError,
        "this is a stack",
    ),
    Case(
        "an empty circuit",
        lambda w: faithfulness(w.tiny, Circuit.empty(graph(w)), w.P, w.Q, w.m).faithfulness(),
        equals=0.0,
    ),
    Case(
        "the completeness of the empty circuit",
        lambda w: completeness(w.tiny, Circuit.empty(graph(w)), w.P, w.Q, w.m).faithfulness(),
        equals=1.0,
    ),
    Case(
        "the area of one circuit", lambda w: faithfulness(w.tiny, full(w), w.P, w.Q, w.m).cpr(), InputError, "a curve"
    ),
    Case(
        "an interval of a metric averaged over prompts",
        lambda w: faithfulness(w.tiny, full(w), w.P, w.Q, lambda logits: w.m(logits).mean()).bootstrap_ci(),
        InputError,
        "one number for all",
    ),
    Case(
        "an interval of one prompt",
        lambda w: faithfulness(w.tiny, full(w), w.P, w.Q, w.m).bootstrap_ci(),
        InputError,
        "at least two prompts",
    ),
    Case(
        "the metric is not callable",
        lambda w: full(w).run(w.tiny, w.P, w.Q, metric="logit_diff"),
        InputError,
        "LogitDiff",
    ),
    Case(
        "another metric's prompts",
        lambda w: full(w).run(w.tiny, w.P, w.Q, metric=LogitDiff([1, 2], [3, 4])),
        InputError,
    ),
)
