"""Estimates that would be zero, meaningless or of another thing than was meant."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from table import Case, World

from tljax.attribution import AtPStar, Verify
from tljax.errors import ArgumentError, InputError
from tljax.patching import KL, NoEffectWarning, node_attribution, sweep


def estimate(world: World, name: str = "z", axes: Any = ("head",), metric: Any = None, **options: Any) -> Any:
    source, options = options.pop("source", world.Q), {"method": "attribution"} | options
    return sweep(world.tiny, world.P, source, metric or world.m, name, axes, **options).effect()


def both(world: World) -> list[str]:
    return [world.P, world.Q]


def mixing(logits: Any) -> Any:
    own = logits[:, -1, 5]
    return own * own.mean()


CASES = [
    Case("a method that is none", lambda w: estimate(w, method="gradient"), InputError, "'exact', 'attribution', 'ig'"),
    Case("a rule that is none", lambda w: estimate(w, rule="atp"), InputError, "rule='atp'", "Did you mean 'atp*'"),
    Case("steps of a first-order estimate", lambda w: estimate(w, steps=5), InputError,
         "does not use steps=5", "method='ig'"),
    Case("an estimate's option of an exact sweep", lambda w: estimate(w, method="exact", rule="relp"), InputError,
         "method='exact' does not use rule='relp'"),
    Case("a rule along a path", lambda w: estimate(w, method="ig", rule="atp*"), InputError, "does not use rule"),
    Case("a misspelt option", lambda w: estimate(w, step=5), ArgumentError, "no option 'step'", "Did you mean 'steps'"),
    Case("no steps", lambda w: estimate(w, method="ig", steps=0), InputError, "steps=0"),
    Case("nothing to verify", lambda w: estimate(w, verify=0), InputError, "Verify(k=...)=0"),
    Case("a yes where a number is meant", lambda w: estimate(w, verify=True), InputError, "verify=True"),
    Case("a confidence of certainty", lambda w: Verify(confidence=1.0), InputError, "between 0 and 1"),
    Case("the divergence from the run itself", lambda w: estimate(w, metric=KL(w.tiny(w.P))), InputError,
         "gradient of the metric is zero at this run", "gradient_at='source'", "LogitDiff"),
    Case("a metric that counts", lambda w: estimate(w, metric=lambda z: (z[:, -1].argmax(-1) == 3).astype(jnp.float32)),
         InputError, "zero everywhere", "LogitDiff"),
    Case("a metric in numpy", lambda w: estimate(w, metric=lambda z: float(z[0, -1, 3])), InputError,
         "cannot be differentiated", "jax.numpy"),
    Case("a metric that mixes prompts, for each prompt",
         lambda w: sweep(w.tiny, both(w), both(w)[::-1], mixing, "z", ("head",), method="attribution", reduce="none"),
         InputError, "other prompts' logits", 'reduce="mean"'),
    Case("the gradient at a source that is no run", lambda w: estimate(w, source=w.tiny.run_with_cache(w.Q)[1],
         gradient_at="source"), InputError, "gradient_at='source'", "as a prompt"),
    Case("an array moved along the inputs", lambda w: estimate(w, source=np.zeros((1,), np.float32), method="ig",
         along="inputs"), InputError, "along='inputs'", "source prompt"),
    Case("numbers of experts or tokens", lambda w: estimate(w, "hook_tokens", ("pos",)), InputError, "sweep patches"),
    Case("a head's inside under the fix", lambda w: estimate(w, "q", ("d_head",), rule="atp*"), InputError,
         "whole heads", "qk_fix=False"),
    Case("the fix left out for a head's inside", lambda w: np.shape(estimate(w, "q", ("d_head",),
         rule=AtPStar(qk_fix=False, grad_drop=False))), equals=(4, 16)),
    Case("several metrics to rank by", lambda w: estimate(w, metric={"a": w.m, "b": w.m}, verify=3),
         InputError, "by one metric"),
    Case("equal prompts", lambda w: estimate(w, source=w.P), NoEffectWarning, "Are both prompts the same?"),
    Case("an estimate of no activation", lambda w: node_attribution(w.tiny, w.P, w.Q, w.m, []), InputError,
         "activation_names"),
    Case("other lengths", lambda w: estimate(w, source=w.S), InputError, "They must have equally many"),
    Case("a source with NaN", lambda w: bool(np.isnan(estimate(w, source=np.full((1,), np.nan,
         np.float32))).all()), equals=True),
]  # fmt: skip
