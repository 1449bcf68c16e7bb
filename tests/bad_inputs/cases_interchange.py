"""Interchange interventions: ranks, bases, pairs, positions, targets that do not fit, activations of elsewhere."""

import functools
from typing import Any

import numpy as np
from table import Case, World

from tljax import HookedTransformer
from tljax.errors import CacheError, InputError, InterventionError, UnknownHookError
from tljax.interchange import (
    Interchange,
    InterchangePairs,
    arbitrary_targets,
    fit_das,
    reader_matrix,
    score_interchange,
    split_by_reader,
    train_interchange,
)

IDS = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
POINT = "blocks.0.hook_resid_post"


def pairs(w: World, base: Any = IDS, source: Any = IDS[::-1], targets: Any = (0, 1, 0), **options: Any) -> Any:
    return InterchangePairs.of(w.small, base, source, targets, **({"task_logits": [2, 3]} | options))


def fit(w: World, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "hook_name": POINT,
        "base_inputs": IDS,
        "source_inputs": IDS[::-1],
        "targets": [0, 1, 0],
    }
    return fit_das(w.small, **(arguments | {"task_logits": [2, 3], "epochs": 1, "controls": ()} | options))


def train(w: World, *, given: Any = None, **options: Any) -> Any:
    return train_interchange(w.small, given or pairs(w), **({"epochs": 1, "controls": ()} | options))


@functools.cache
def broken() -> HookedTransformer:
    """A model whose embedding of token 8 is NaN."""
    model = HookedTransformer(World.config())
    embed = np.array(model.params["embed"]["W_E"])
    embed[8] = np.nan
    return model.replace(params=model.params | {"embed": {"W_E": embed}})


def padded(w: World) -> Any:
    return w.small.to_batch([[1, 2, 3], [4, 5], [6, 7]])


CASES: tuple[Case, ...] = (
    Case("a rank above the width", lambda w: fit(w, rank=9), InputError, "rank=9 is more than the 8 dimensions"),
    Case("a rank of zero", lambda w: fit(w, rank=0), InputError, "rank=0", "at least 1"),
    Case(
        "a basis that is not orthonormal", lambda w: score_interchange(w.small, pairs(w), POINT, np.ones((8, 2))),
        InterventionError, "not orthonormal", "jnp.linalg.qr",
    ),
    Case(
        "a basis of another point", lambda w: score_interchange(w.small, pairs(w), POINT, np.eye(4)[:, :1]),
        InputError, "has 4 rows", "8 dimensions",
    ),
    Case(
        "a basis on its side", lambda w: Interchange(0.0, np.eye(8)[:2]), InterventionError, "transpose, [8, 2]",
    ),
    Case(
        "fewer sources than bases", lambda w: pairs(w, source=IDS[:2]), InputError,
        "3 base prompts, 2 source prompts and 3 targets", "repeat them",
    ),
    Case("fewer targets than pairs", lambda w: pairs(w, targets=[0, 1]), InputError, "3 source prompts and 2 targets"),
    Case("a position beyond the text", lambda w: fit(w, base_positions=3), InputError, "no position 3 in prompt 0"),
    Case(
        "a source position beyond a shorter source", lambda w: fit(w, source_inputs=padded(w), source_positions=2),
        InputError, "source_pos", "no position 2 in prompt 1, which has 2 tokens",
    ),
    Case("positions of other pairs", lambda w: fit(w, base_positions=[0, 1]), InputError, "each of the 3 pairs"),
    Case("a position with a half", lambda w: fit(w, base_positions=1.5), InputError, "takes a whole number"),
    Case("a name of no position", lambda w: train(w, pos="subject"), InputError, "name no position 'subject'"),
    Case(
        "a misspelt name of a position",
        lambda w: train(w, given=pairs(w, pos={"subject": 1}), pos=["subjct"]), InputError, "Did you mean 'subject'",
    ),
    Case(
        "token ids as targets", lambda w: pairs(w, targets=[2, 3, 2]), InputError, "The target 2 is no index", "0 to 1",
        "not token ids",
    ),
    Case("a target that is no token", lambda w: pairs(w, targets=[0, 12, 0], task_logits=None), InputError, "0 to 11"),
    Case("a class outside the vocabulary", lambda w: pairs(w, task_logits=[2, 12]), InputError, "task_logits holds 12"),
    Case("one class", lambda w: pairs(w, task_logits=[2]), InputError, "two classes or more"),
    Case(
        "a target that a function does not give",
        lambda w: train(w, given=pairs(w, targets=[0, 5, 0], task_logits=lambda logits: logits[:, -1, :2])),
        InputError, "The target 5 is no index into the task logits: the function gives 2 classes",
    ),
    Case(
        "a function of logits that keeps the positions",
        lambda w: train(w, given=pairs(w, task_logits=lambda logits: logits)), InputError, "task_logits returned shape",
        "logits[:, -1]",
    ),
    Case(
        "logits[:, -1] of prompts padded right",
        lambda w: pairs(w, base=padded(w), task_logits=lambda logits: logits[:, -1]), InputError, "is padding there",
        "padding_side='left'",
    ),
    Case(
        "a hook that does not exist", lambda w: fit(w, hook_name="blocks.0.hook_resid_pots"), UnknownHookError,
        "Did you mean 'blocks.0.hook_resid_post'",
    ),
    Case("a pattern", lambda w: train(w, activation_name="pattern"), InputError, "needs a vector for each position"),
    Case("the embedding", lambda w: fit(w, hook_name="hook_embed"), InputError, "blocks.0.hook_resid_pre"),
    Case("heads, but not which", lambda w: fit(w, hook_name="blocks.0.attn.hook_z"), InputError, "2 heads", "head="),
    Case("a head of a stream", lambda w: fit(w, head=1), InputError, "no axis of heads"),
    Case("a head that does not exist", lambda w: train(w, activation_name="z", heads=[2]), InputError, "head=2"),
    Case(
        "NaN in the source", lambda w: fit_das(broken(), POINT, IDS[:2], IDS[1:], [0, 1], [2, 3], source_positions=1),
        InputError, "source run of pair 1", "not finite",
    ),
    Case(
        "the cache of another model",
        lambda w: pairs(w, source=HookedTransformer(w.config(seed=3)).run_with_cache(IDS)[1]), CacheError,
        "The source cache", "not this one",
    ),
    Case(
        "a cache without the point",
        lambda w: train(w, given=pairs(w, source=w.small.run_with_cache(IDS, names_filter="hook_embed")[1])),
        InputError, "does not hold blocks.0.hook_resid_post", "names_filter",
    ),
    Case(
        "a hooked model",
        lambda w: train_interchange(w.small.add_hook(POINT, lambda x, hook: x), pairs(w)), InputError, "reset_hooks",
    ),
    Case("a method that does not exist", lambda w: train(w, method="dass"), InputError, "'das'"),
    Case("a rank for a mask", lambda w: train(w, method="dbm", rank=2), InputError, "leave rank= out"),
    Case("mdas without iso pairs", lambda w: train(w, method="mdas"), InputError, "pass iso="),
    Case("a temperature for das", lambda w: train(w, temperature=(1, 0.1)), InputError, "belong to gates"),
    Case("a control that does not exist", lambda w: train(w, controls=["random"]), InputError, "'random'"),
    Case("a test of other classes", lambda w: train(w, test=pairs(w, task_logits=[3, 2])), InputError, "same classes"),
    Case("a reader of the stream", lambda w: reader_matrix(w.small, POINT), InputError, "No single matrix reads"),
    Case("a reader from the left", lambda w: split_by_reader(np.eye(8)[:, :1], np.eye(4)), InputError, "has 8 rows"),
    Case(
        "arbitrary labels are the same everywhere", lambda w: arbitrary_targets(["a", "b", "c", "d"], 5).tolist(),
        equals=[2, 3, 0, 3],
    ),
    Case(
        "strength zero is the base run",
        lambda w: score_interchange(w.small, pairs(w), POINT, np.eye(8)[:, :2], strength=0.0).logits,
        equals=lambda w: np.asarray(w.small(IDS))[:, -1, 2:4],
    ),
    Case(
        "the whole vector at the last layer is the source run",
        lambda w: score_interchange(w.small, pairs(w), POINT).logits,
        equals=lambda w: np.asarray(w.small(IDS[::-1]))[:, -1, 2:4],
    ),
)  # fmt: skip
