"""Feature attribution: what has no answer is refused with the fix."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from table import Case, World

from tljax import HookedTransformer
from tljax.dictionaries import Dictionary, DictionaryConfig, Tap
from tljax.dictionaries.attribution import (
    FeatureCircuit,
    direct_feature_attribution,
    feature_circuit,
    feature_completeness,
    feature_effects,
    feature_faithfulness,
    feature_logits,
    similar_features,
    stream_directions,
    virtual_weights,
)
from tljax.errors import DictionaryError, InputError
from tljax.patching import KL, LogitDiff

TOKENS, OTHERS = [[1, 2, 3, 4]], [[5, 2, 3, 4]]
METRIC = LogitDiff(1, 2)
POINT = "blocks.0.hook_resid_pre"


def made(reads: str | None = POINT, width: int = 8, seed: int = 0) -> Dictionary:
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (width, 6), "b_enc": (6,), "W_dec": (6, width), "b_dec": (width,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Dictionary(params, DictionaryConfig(d_in=width, d_sae=6, tap=Tap(reads=reads)))


@functools.cache
def spliced(small: HookedTransformer) -> HookedTransformer:
    return small.with_dictionaries(made())


def effects(w: World, *args: Any, **options: Any) -> Any:
    """Effects of features of the small model; arguments given replace the usual ones from the left."""
    usual = (spliced(w.small), TOKENS, METRIC)
    return feature_effects(*args, *usual[len(args) :], **options)


@functools.cache
def circuit(small: HookedTransformer) -> FeatureCircuit:
    return feature_circuit(
        spliced(small), TOKENS, METRIC, source=OTHERS, method="gradient", node_threshold=0.0, edge_threshold=0.0
    )


def other(w: World) -> HookedTransformer:
    """Another model of the same shape, with the same dictionary."""
    return HookedTransformer(w.config(seed=7)).with_dictionaries(made())


CASES = [
    Case("effects without dictionaries", lambda w: effects(w, w.small), InputError, "with_dictionaries"),
    Case("a point without a dictionary", lambda w: effects(w, points="blocks.0.hook_mlp_out"), InputError, POINT),
    Case("a longer source", lambda w: effects(w, source=[[1, 2, 3]]), InputError, "equally many"),
    Case(
        "a metric whose gradient is zero",
        lambda w: effects(w, spliced(w.small), TOKENS, lambda logits: 0 * logits[:, -1, 1], method="gradient"),
        InputError,
        "zero everywhere",
    ),
    Case(
        "KL to the run itself, by gradient",
        lambda w: effects(w, spliced(w.small), TOKENS, KL(w.small(TOKENS)), method="gradient"),
        InputError,
        "second order",
    ),
    Case(
        "one number for two prompts",
        lambda w: effects(w, spliced(w.small), TOKENS + OTHERS, lambda logits: logits[0, -1, 1]),
        InputError,
        "Index all",
    ),
    Case("several metrics", lambda w: effects(w, spliced(w.small), TOKENS, {"a": METRIC}), InputError, "one metric"),
    Case(
        "a metric that is NaN",
        lambda w: effects(w, spliced(w.small), TOKENS, lambda logits: jnp.nan * logits[:, -1, 1]),
        InputError,
        "not finite",
    ),
    Case("steps of an exact method", lambda w: effects(w, steps=5), InputError, "steps=5", "ig"),
    Case("no strongest features", lambda w: effects(w, k=0), InputError, "at least 1"),
    Case("verified exact effects", lambda w: effects(w, verify=3), InputError, "exact"),
    Case("a misspelt method", lambda w: effects(w, method="grad"), InputError, "gradient"),
    Case("top of a point that is not there", lambda w: effects(w).top(point="blocks.1.x"), InputError, POINT),
    Case("a feature that does not exist", lambda w: feature_logits(w.small, made(), 6), InputError, "6", "0 to 5"),
    Case("a feature as text", lambda w: feature_logits(w.small, made(), ["a"]), InputError, "numbers of features"),
    Case("similar to no feature", lambda w: similar_features(made(), 6), InputError, "feature=6"),
    Case("a dictionary of another width", lambda w: feature_logits(w.small, made(width=9)), DictionaryError, "9", "8"),
    Case(
        "a dictionary of a layer that is not there",
        lambda w: stream_directions(w.small, made("blocks.7.hook_resid_pre")),
        DictionaryError,
        "blocks.7",
    ),
    Case(
        "a dictionary of queries has no direction in the stream",
        lambda w: stream_directions(w.small, made("blocks.0.attn.hook_q")),
        DictionaryError,
        "no fixed linear map",
    ),
    Case(
        "attribution of a dictionary of nowhere",
        lambda w: direct_feature_attribution(w.small, made(None), TOKENS, 1),
        DictionaryError,
        "tap",
    ),
    Case(
        "weights backwards",
        lambda w: virtual_weights(made("blocks.0.hook_resid_post"), made(), w.small),
        DictionaryError,
        "Swap",
    ),
    Case("weights between widths", lambda w: virtual_weights(made(), made(width=9)), DictionaryError, "8", "9"),
    Case(
        "weights into what does not read the stream",
        lambda w: virtual_weights(made(), made("blocks.0.hook_mlp_out"), w.small),
        DictionaryError,
        "feature_circuit",
    ),
    Case(
        "through a head without a model",
        lambda w: virtual_weights(made(), made("blocks.0.hook_resid_post"), through=(0, 0)),
        InputError,
        "give the model",
    ),
    Case(
        "a circuit by position of padded prompts",
        lambda w: feature_circuit(spliced(w.small), w.small.to_batch([[1, 2, 3], [1, 2]]), METRIC, by_position=True),
        InputError,
        "equally many",
    ),
    Case(
        "a negative threshold",
        lambda w: feature_circuit(spliced(w.small), TOKENS, METRIC, node_threshold=-1.0),
        InputError,
        "node_threshold",
    ),
    Case(
        "a circuit of another model",
        lambda w: feature_faithfulness(other(w), circuit(w.small), TOKENS, METRIC, ablation="zero"),
        InputError,
        "another model",
        "weights",
    ),
    Case(
        "a circuit on a model without dictionaries",
        lambda w: feature_faithfulness(w.small, circuit(w.small), TOKENS, METRIC, ablation="zero"),
        InputError,
        "carries none there",
    ),
    Case(
        "a circuit of another dictionary",
        lambda w: feature_completeness(
            w.small.with_dictionaries(made(seed=1)), circuit(w.small), TOKENS, METRIC, ablation="zero"
        ),
        InputError,
        "another dictionary",
    ),
    Case(
        "mean ablation without a source",
        lambda w: feature_faithfulness(spliced(w.small), circuit(w.small), TOKENS, METRIC),
        InputError,
        "source=",
    ),
    Case(
        "ablation by the prompt itself",
        lambda w: feature_faithfulness(
            spliced(w.small), circuit(w.small), TOKENS, METRIC, source=TOKENS, ablation="patching"
        ),
        InputError,
        "nothing to explain",
    ),
    Case(
        "a node of a feature that is not there",
        lambda w: dataclasses.replace(circuit(w.small), widths=(2,)),
        InputError,
        "no feature",
    ),
    Case("the mask of no point", lambda w: circuit(w.small).mask("blocks.1.x"), InputError, "blocks.1.x", POINT),
    Case(
        "a picture without edges",
        lambda w: circuit(w.small).select(edge_threshold=1e9).picture(),
        InputError,
        "edge_threshold",
    ),
]
