"""Edge scores: what has no answer is refused with the fix, what is easily confused gives the right value."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from table import Case, World

from tljax.circuits import ResidualGraph, edge_scores
from tljax.errors import ArgumentError, InputError
from tljax.patching import KL, LogitDiff

TOKENS, OTHERS = [[1, 2, 3, 4]], [[5, 2, 3, 4]]
METRIC = LogitDiff(1, 2)


def scored(w: World, *args: Any, **options: Any) -> Any:
    """Scores of the small model; arguments given replace the usual ones from the left."""
    usual = (w.small, TOKENS, OTHERS, METRIC)
    return edge_scores(*args, *usual[len(args) :], **options)


CASES = [
    Case("a longer source", lambda w: scored(w, w.tiny, w.P, w.P + " Mary", w.m), InputError, "15", "16", "align"),
    Case("fewer sources than prompts", lambda w: scored(w, w.small, TOKENS * 2), InputError, "2 base", "1 source"),
    Case("an alignment of another shape", lambda w: scored(w, align=[0, 1, 2, 3]), InputError, "(4,)", "(1, 4)"),
    Case("no source", lambda w: scored(w, w.small, TOKENS, None), InputError, "source="),
    Case("the prompt itself as source", lambda w: scored(w, w.small, TOKENS, TOKENS), InputError, "same"),
    Case(
        "KL to the run itself",
        lambda w: scored(w, w.small, TOKENS, OTHERS, KL(w.small(TOKENS))),
        InputError,
        "no gradient",
        "eap-ig",
    ),
    Case(
        "KL to the run itself, of one's own making",
        lambda w: scored(w, w.small, TOKENS, OTHERS, own_kl(w.small(TOKENS))),
        InputError,
        "no gradient",
        "LogitDiff",
    ),
    Case(
        "a metric that needs numbers",
        lambda w: scored(w, w.small, TOKENS, OTHERS, lambda logits: float(logits[0, -1, 1])),
        InputError,
        "differentiated",
    ),
    Case("several metrics", lambda w: scored(w, w.small, TOKENS, OTHERS, {"a": METRIC}), InputError, "each"),
    Case("no metric", lambda w: scored(w, w.small, TOKENS, OTHERS, None), InputError, "LogitDiff"),
    Case(
        "a metric that is NaN",
        lambda w: scored(w, w.small, TOKENS, OTHERS, lambda logits: jnp.nan * logits[:, -1, 1]),
        InputError,
        "nan",
        "prompt 0",
    ),
    Case(
        "a gradient that is infinite",
        lambda w: scored(w, w.small, TOKENS, OTHERS, lambda logits: jnp.sqrt(0 * logits[:, -1, 1])),
        InputError,
        "not finite",
    ),
    Case(
        "one number for all prompts, each wanted",
        lambda w: scored(w, w.small, TOKENS, OTHERS, lambda logits: logits.mean(), reduce="none"),
        InputError,
        "Index all",
    ),
    Case(
        "a graph of another model", lambda w: scored(w, graph=ResidualGraph.of(w.tiny)), InputError, "n_layers=4", "1"
    ),
    Case("an unknown method", lambda w: scored(w, method="eap-igg"), InputError, "eap-ig"),
    Case("steps without a path", lambda w: scored(w, steps=5), InputError, "steps=", "eap-ig"),
    Case("a grid without a path", lambda w: scored(w, method="clean-corrupted", grid="gauss"), InputError, "grid="),
    Case("no steps", lambda w: scored(w, method="eap-ig", steps=0), InputError, "at least 1"),
    Case(
        "steps and tolerance",
        lambda w: scored(w, method="eap-ig", steps=5, tolerance=0.1),
        InputError,
        "one of the two",
    ),
    Case(
        "a tolerance of what has no sum",
        lambda w: scored(w, method="eap-ig-activations", tolerance=0.1),
        InputError,
        "mask-ig",
    ),
    Case(
        "means along inputs", lambda w: scored(w, method="eap-ig", ablation="mean"), InputError, "patching", "mask-ig"
    ),
    Case("an unknown ablation", lambda w: scored(w, ablation="resample"), InputError, "patching"),
    Case("an unknown axis", lambda w: scored(w, axes=("head",)), InputError, "pos"),
    Case("a misspelt option", lambda w: scored(w, ablaton="zero"), ArgumentError, "ablation"),
    Case(
        "a model with hooks",
        lambda w: scored(w, w.tiny.add_hook("embed", lambda a, hook: a), w.P, w.Q, w.m),
        InputError,
        "reset_hooks",
    ),
    Case("an edge that is none", lambda w: scored(w)["m0->a0.h0<q>"], InputError, "does not come after"),
    Case("an interval of a mean", lambda w: scored(w).bootstrap_ci(), InputError, 'reduce="none"'),
    Case("an interval of one prompt", lambda w: scored(w, reduce="none").bootstrap_ci(), InputError, "two prompts"),
    Case(
        "scores of two graphs compared",
        lambda w: scored(w).rank_correlation(scored(w, w.tiny, w.P, w.Q, w.m)),
        InputError,
        "different graphs",
    ),
    Case(
        "effects compared with shares",
        lambda w: scored(w).rank_correlation(scored(w, method="information-flow")),
        InputError,
        "mean different things",
    ),
    Case(
        "the last position of padded prompts",
        lambda w: scored(w, w.tiny, [w.P, w.S], [w.Q, w.S.replace("John", "Mary")], w.m, reduce="none").values[0],
        equals=lambda w: scored(w, w.tiny, w.P, w.Q, w.m).values,
        tolerance=1e-4,
    ),
]


def own_kl(base: Any) -> Any:
    """The divergence from given logits, as a plain function."""
    wanted = np.asarray(jnp.exp(base - jnp.log(jnp.exp(base).sum(axis=-1, keepdims=True))))[:, -1]

    def divergence(logits: Any) -> Any:
        row = jnp.asarray(logits[:, -1])
        row = row - jnp.log(jnp.exp(row).sum(axis=-1, keepdims=True))
        return (wanted * (jnp.log(wanted) - row)).sum(axis=-1)

    return divergence
