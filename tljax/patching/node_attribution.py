"""Attribution of several kinds of activation at once, from one backward pass."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, Unpack

from tljax.attribution.integrated import extra_points
from tljax.attribution.options import EstimateOptions, read_estimate
from tljax.checks import typed
from tljax.errors import InputError
from tljax.hooks.points import layer_of, point_table
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.engine.run import Metrics, Reduce
from tljax.patching.estimated import estimated_sweeps
from tljax.patching.naming import named_points
from tljax.patching.result import PatchingResult
from tljax.patching.sources import read_source
from tljax.patching.sweep import prepare_sweep, site_grid


@functools.partial(typed, receiver=read_estimate)
def node_attribution(
    model: HookedTransformer,
    corrupted: Any,
    source: Any,
    metric: Metrics,
    activation_names: Sequence[str] = ("embed", "z", "mlp_out"),
    axes: Sequence[str] = ("head", "pos"),
    *,
    layers: Sequence[int] | int | None = None,
    reduce: Reduce = "mean",
    method: Literal["attribution", "ig"] = "attribution",
    **options: Unpack[EstimateOptions],
) -> dict[str, PatchingResult]:
    """Estimates the effect of patching each node of a model: by default the embedding, each head and each MLP.

    The sites of all kinds come from the same base run, source run and backward pass, so this costs what one estimated
    :func:`~tljax.patching.sweep` costs. Each result is that of the sweep with the same arguments.

    Args:
        model, corrupted, source, metric, layers, reduce: as in :func:`~tljax.patching.sweep`.
        activation_names: the activations.
        axes: the axes that tell sites apart, of which each activation takes those that it has.
        method, **options: as in a sweep.

    Returns:
        For each activation's name, its result.

    Raises:
        InputError: as in a sweep; or no activation.
    """
    how = read_estimate(method, **options)
    assert how is not None
    if isinstance(activation_names, str) or not activation_names:
        raise InputError(f"activation_names={activation_names!r} is not a list of names, such as ['z', 'mlp_out'].")
    extra = extra_points(model, how.along) if how.method == "ig" else ()
    named = {name: _points(model, name, layers) for name in dict.fromkeys(activation_names)}
    every = tuple(dict.fromkeys([point for points, _ in named.values() for point in points] + list(extra)))
    setup = prepare_sweep(model, corrupted, activation_names[0], extra=every)
    read = read_source(model, setup.base, source, every)
    kinds, table = {}, point_table(model.cfg)
    for name, (points, numbers) in named.items():
        here = dataclasses.replace(setup, name=name, layers=numbers, names=points, spec=table[points[0]])
        own = [axis for axis in axes if axis in here.spec.axes]
        kinds[name] = site_grid(model, here, lambda spec: read.values(spec)[None], own, None, tolerance=read.tolerance)
    results = estimated_sweeps(model, setup.base, kinds, read, metric, how, reduce, "auto", None)
    return dict(zip(kinds, results, strict=True))


def _points(
    model: HookedTransformer, name: str, layers: Sequence[int] | int | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Returns an activation's points and layers; ``layers`` says nothing of a point of the embedding."""
    found = named_points(model.cfg, name, None)
    in_blocks = layer_of(found[0][0]) is not None
    return named_points(model.cfg, name, layers) if in_blocks and layers is not None else found
