"""Gradients at hook points: metrics that cannot be differentiated, points and directions that do not fit."""

import jax.numpy as jnp
import numpy as np
from table import Case, World

from tljax import Add, ZeroGradientWarning
from tljax.errors import ArgumentError, InputError, InterventionError, UnknownHookError
from tljax.patching import KL, LogitDiff

RIGHT = jnp.asarray([[1, 1, 1, 0], [1, 1, 0, 0]])
PADDED = [[1, 2, 3, 0], [1, 2, 0, 0]]


def _accuracy(logits: jnp.ndarray) -> jnp.ndarray:
    return (logits[:, -1].argmax(-1) == 3).mean()


def _root_of_zero(logits: jnp.ndarray) -> jnp.ndarray:
    return jnp.sqrt(logits[:, -1, 1] - logits[:, -1, 1])


def _to_itself(w: World) -> object:
    return w.small.run_with_grads([[1, 2]], KL(w.small([[1, 2]])), "z0")


CASES: tuple[Case, ...] = (
    Case("KL to a run of another length",
         lambda w: w.small.run_with_grads([[1, 2, 3]], KL.to_run(w.small, [[1, 2]]), "z0"),
         InputError, "KL compares logits of shape (1, 3,", "equally many tokens"),
    Case("a metric that takes floats", lambda w: w.small.run_with_grads([[1]], lambda x: float(x[0, -1, 3])),
         InputError, "took numbers out of the logits", "float()", "jnp"),
    Case("a metric in numpy", lambda w: w.small.run_with_grads([[1]], lambda x: np.asarray(x)[0, -1, 3]),
         InputError, "np.asarray", "convert the value that comes back"),
    Case("a metric in numpy, forward",
         lambda w: w.small.run_with_jvp([[1]], {"z0": 1.0}, lambda x: np.asarray(x).sum()), InputError, "np.asarray"),
    Case("accuracy", lambda w: w.small.run_with_grads([[1]], _accuracy), InputError, "argmax", "LogitDiff"),
    Case("a constant", lambda w: w.small.run_with_grads([[1]], lambda x: 1.0), InputError, "returned 1.0", "zero"),
    Case("logits for a metric", lambda w: w.small.run_with_grads([[1]], lambda x: x), InputError, "(1, 1, 12)"),
    Case("a name for a metric", lambda w: w.small.run_with_grads([[1]], "loss"), InputError, "'loss'", "LogitDiff"),
    Case("no metric", lambda w: w.small.run_with_grads([[1]], {}), InputError, "holds no metric"),
    Case("a root at zero", lambda w: w.small.run_with_grads([[1]], {"root": _root_of_zero}),
         InputError, "'root'", "not finite", "floor"),
    Case("a run compared with itself", _to_itself, ZeroGradientWarning, "itself", "corrupted"),
    Case("a token that does not exist", lambda w: w.small.run_with_grads([[1]], LogitDiff(1, 99)), InputError, "99"),
    Case("a position that does not exist", lambda w: w.small.run_with_grads([[1]], LogitDiff(1, 2, pos=7)),
         InputError, "no position 7"),
    Case("the padding's logits", lambda w: w.small.run_with_grads(PADDED, lambda x: x[:, -1, 3], attention_mask=RIGHT),
         InputError, "position 3 of prompt 0", "padding"),
    Case("of the text instead",
         lambda w: w.small.run_with_grads(PADDED, LogitDiff(1, 2), "z0", attention_mask=RIGHT).value[1],
         equals=lambda w: w.small.run_with_grads([[1, 2]], LogitDiff(1, 2), "z0").value[0]),
    Case("a point that does not exist", lambda w: w.small.run_with_grads([[1]], LogitDiff(1, 2), "z9"),
         UnknownHookError, "numbered 0 to 0"),
    Case("a point not kept", lambda w: w.small.run_with_grads([[1]], LogitDiff(1, 2), "z0").grads["v0"],
         UnknownHookError, "include it in names_filter"),
    Case("token ids", lambda w: w.small.run_with_grads([[1]], LogitDiff(1, 2), "hook_tokens"),
         InputError, "hook_tokens has no gradient", "whole numbers"),
    Case("no direction", lambda w: w.small.run_with_jvp([[1]], {}), InputError, "holds at least one"),
    Case("a direction without its point", lambda w: w.small.run_with_jvp([[1]], np.ones(8)), InputError, "hook names"),
    Case("a direction too long", lambda w: w.small.run_with_jvp([[1]], {"resid_pre0": np.ones(9)}),
         InterventionError, "(9,)", "(1, 1, 8)"),
    Case("moved where there is nothing",
         lambda w: w.small.run_with_hvp([[1]], LogitDiff(1, 2), {"z0": Add(1.0, pos=3)}), InterventionError, "pos=3"),
    Case("the logits of a range", lambda w: w.small.run_with_grads([[1]], LogitDiff(1, 2), stop_at_layer=1),
         ArgumentError, "stop_at_layer"),
)  # fmt: skip
