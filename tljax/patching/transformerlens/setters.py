"""Patch setters: functions ``(corrupted_activation, index, clean_activation)`` that return the patched activation.

TransformerLens's setters, by name, and the conversion of a user's own setter to the values that a sweep writes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import InputError
from tljax.hooks.points import HookPointSpec
from tljax.memory import how_many
from tljax.patching.engine.base_run import BaseRun
from tljax.patching.engine.sites import Sites
from tljax.patching.sources import out_of_padding, without_padding
from tljax.sizes import power_of_two, power_of_two_within

PatchSetter = Callable[[jax.Array, Sequence[Any], jax.Array], Any]
"""Takes the base run's activation, a row of the index and the clean activation; returns the patched activation."""


def layer_pos_patch_setter(
    corrupted_activation: jax.Array, index: Sequence[int], clean_activation: jax.Array
) -> jax.Array:
    """Takes one position ``(layer, pos)`` of activations ``[batch, pos, ...]`` from the clean run."""
    _, pos = index
    return _take(corrupted_activation, clean_activation, (slice(None), pos))


def layer_pos_head_vector_patch_setter(
    corrupted_activation: jax.Array, index: Sequence[int], clean_activation: jax.Array
) -> jax.Array:
    """Takes one head at one position ``(layer, pos, head)`` of ``[batch, pos, head, d_head]`` from the clean run."""
    _, pos, head = index
    return _take(corrupted_activation, clean_activation, (slice(None), pos, head))


def layer_head_vector_patch_setter(
    corrupted_activation: jax.Array, index: Sequence[int], clean_activation: jax.Array
) -> jax.Array:
    """Takes one head at all positions ``(layer, head)`` of ``[batch, pos, head, d_head]`` from the clean run."""
    _, head = index
    return _take(corrupted_activation, clean_activation, (slice(None), slice(None), head))


def layer_head_pattern_patch_setter(
    corrupted_activation: jax.Array, index: Sequence[int], clean_activation: jax.Array
) -> jax.Array:
    """Takes one head ``(layer, head)`` of ``[batch, head, query_pos, key_pos]`` from the clean run."""
    _, head = index
    return _take(corrupted_activation, clean_activation, (slice(None), head))


def layer_head_pos_pattern_patch_setter(
    corrupted_activation: jax.Array, index: Sequence[int], clean_activation: jax.Array
) -> jax.Array:
    """Takes one row ``(layer, head, query_pos)`` of ``[batch, head, query_pos, key_pos]`` from the clean run."""
    _, head, query_pos = index
    return _take(corrupted_activation, clean_activation, (slice(None), head, query_pos))


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: jax.Array, index: Sequence[int], clean_activation: jax.Array
) -> jax.Array:
    """Takes one cell ``(layer, head, query_pos, key_pos)`` of ``[batch, head, query_pos, key_pos]``."""
    _, head, query_pos, key_pos = index
    return _take(corrupted_activation, clean_activation, (slice(None), head, query_pos, key_pos))


def _take(corrupted: jax.Array, clean: jax.Array, where: tuple[Any, ...]) -> jax.Array:
    return corrupted.at[where].set(clean[where].astype(corrupted.dtype))


_VECTORS = ("batch", "pos", "head")
_SCORES = ("batch", "head", "query_pos", "key_pos")
_KNOWN: tuple[tuple[PatchSetter, tuple[str, ...], tuple[str, ...]], ...] = (
    (layer_pos_patch_setter, ("pos",), ("batch", "pos")),
    (layer_pos_head_vector_patch_setter, ("pos", "head"), _VECTORS),
    (layer_head_vector_patch_setter, ("head",), _VECTORS),
    (layer_head_pattern_patch_setter, ("head",), _SCORES),
    (layer_head_pos_pattern_patch_setter, ("head", "query_pos"), _SCORES),
    (layer_head_dest_src_pos_pattern_patch_setter, ("head", "query_pos", "key_pos"), _SCORES),
)
"""Each known setter, the axes its index has after the layer, and the axes its activations begin with."""


def axes_of(setter: PatchSetter, spec: HookPointSpec) -> tuple[str, ...] | None:
    """Returns the axes that a known setter's index has after the layer; ``None`` for any other function.

    Raises:
        InputError: ``setter`` is not a function, or the point lacks the axes that it needs.
    """
    if not callable(setter):
        raise InputError(
            f"patch_setter is a function (corrupted_act, index, clean_act) -> act; got {type(setter).__name__}."
        )
    for known, axes, needed in _KNOWN:
        if known is setter:
            if spec.axes[: len(needed)] != needed:
                raise InputError(
                    f"{known.__name__} patches activations with axes {needed}; {spec.name} has {spec.axes}. Choose the "
                    "setter of that kind, or write one."
                )
            return axes
    return None


def set_values(
    setter: PatchSetter, corrupted: jax.Array, index: Sequence[Any], clean: jax.Array, name: str
) -> np.ndarray:
    """Calls a setter and returns the patched activation.

    Raises:
        InputError: the setter assigned in place, or returned something else than an activation of this shape.
    """
    fix = "return corrupted_act.at[:, pos].set(clean_act[:, pos])"
    try:
        value = setter(corrupted, index, clean)
    except TypeError as error:
        if "immutable" not in str(error) and "item assignment" not in str(error):
            error.add_note(f"(raised in the patch_setter at {name}, index {list(index)})")
            raise
        raise InputError(
            f"The patch_setter assigned into the activation of {name}. JAX arrays cannot change in place: {fix} "
            "instead of writing corrupted_act[:, pos] = clean_act[:, pos]."
        ) from error
    except Exception as error:
        error.add_note(f"(raised in the patch_setter at {name}, index {list(index)})")
        raise
    if value is None:
        raise InputError(
            f"The patch_setter returned None at {name}. JAX arrays cannot change in place, so it must return the "
            f"patched activation: {fix}."
        )
    shape = getattr(value, "shape", None)
    if shape != corrupted.shape:
        got = f"an array of shape {tuple(shape)}" if shape is not None else f"a {type(value).__name__}"
        raise InputError(
            f"The patch_setter returned {got} for index {list(index)}; {name} has shape {corrupted.shape}. Return the "
            f"whole activation, patched: {fix}."
        )
    return np.asarray(value)


def custom_sites(
    setter: PatchSetter,
    base: BaseRun,
    specs: Mapping[int, HookPointSpec],
    layer: np.ndarray,
    index: Sequence[Sequence[Any]],
    clean: Callable[[HookPointSpec], jax.Array],
    tolerance: float,
) -> Iterator[tuple[np.ndarray, Sites]]:
    """Makes sites that write what a setter returns, in groups whose values fit in memory together.

    The values of a site are a whole activation; a sweep finds the positions and prompts that change by comparing them.

    Args:
        setter: the setter.
        base: the unpatched run.
        specs: the patched point at each layer.
        layer: ``[site]``, each site's layer.
        index: the index of each site, as the setter takes it.
        clean: function from a point to its clean activation, as the setter takes it.
        tolerance: as in :class:`~tljax.patching.engine.sites.Sites`.

    Yields:
        The numbers of some sites, and those sites.
    """
    first = base.activations[specs[int(layer[0])].name]
    for rows, size in _groups(layer, first.size * first.dtype.itemsize):
        values, variant = {}, np.zeros(len(rows), int)
        for number in np.unique(layer[rows]):
            spec, here = specs[int(number)], np.flatnonzero(layer[rows] == number)
            whole = np.asarray(base.activations[spec.name])
            table = np.broadcast_to(whole, (size, *whole.shape)).copy()
            part = without_padding(base, spec)
            corrupted, clean_activation = out_of_padding(base, spec), clean(spec)
            for entry, row in enumerate(rows[here]):
                table[entry][part] = set_values(setter, corrupted, index[row], clean_activation, spec.name)
            values[int(number)], variant[here] = jnp.asarray(table), np.arange(len(here))
        yield rows, Sites(specs[int(layer[0])], layer[rows], values, variant, {}, {}, tolerance)


def _groups(layer: np.ndarray, site_bytes: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the sites to hold at once, and the number of values a layer: equal in all groups, which share programs."""
    layers, counts = np.unique(layer, return_counts=True)
    size = min(power_of_two(int(counts.max())), power_of_two_within(how_many(site_bytes)))
    together = how_many(size * site_bytes)
    for start in range(0, len(layers), together):
        rows = [np.flatnonzero(layer == number) for number in layers[start : start + together]]
        for first in range(0, max(map(len, rows)), size):
            yield np.concatenate([part[first : first + size] for part in rows]), size
