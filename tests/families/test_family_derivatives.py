"""Gradients at every hook point of every family against finite differences in double precision."""

from typing import Any

import numpy as np
import pytest
from double_precision import double_precision
from family_case import FamilyCase

from tljax import Add, HookedTransformer
from tljax.patching import LogProb

STEPS = np.array([0.0, 1e-6, -1e-6])
"""How far each row of one run goes along the direction: the first has the gradient, the others the difference."""
PROMPT = np.array([3, 14, 15, 9, 26])
TOLERANCE = 1e-6


@pytest.mark.one_variant_a_family
def test_directional_derivative_at_all_points(case: FamilyCase) -> None:
    """All points that have a gradient move at once, so one number holds for all of them."""
    with double_precision():
        model = HookedTransformer.from_pretrained_no_processing(case.directory, dtype="float64")
        along, hooks = directions(model), []
        for name, one in along.items():
            hooks.append((name, Add(STEPS.reshape(-1, *(1,) * (one.ndim - 1)) * one)))
        found = model.with_hooks(hooks).run_with_grads(np.tile(PROMPT, (3, 1)), LogProb(7), list(along))
        assert {str(value.dtype) for value in found.grads.values()} == {"float64"}
        gradients = {name: np.asarray(found.grads[name][0]) for name in along}
    _, up, down = np.asarray(found.value, np.float64)
    slope = sum(np.vdot(gradients[name], one[0]) for name, one in along.items())
    still = [name for name, gradient in gradients.items() if not gradient.any()]
    assert all(name.endswith("hook_router_scores") for name in still), still  # some routers only choose by them
    np.testing.assert_allclose(slope, (up - down) / (STEPS[1] - STEPS[2]), rtol=TOLERANCE, atol=TOLERANCE)


def directions(model: HookedTransformer) -> dict[str, Any]:
    """A random direction at every point that has a gradient, the same in every row: ``[1, pos, ...]``."""
    rng = np.random.default_rng(0)
    points = [point for point in model.hook_points() if not point.optional and not point.holds_numbers]
    return {point.name: rng.standard_normal(point.shape(1, len(PROMPT))) for point in points}
