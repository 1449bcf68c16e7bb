"""Stacks of heads or neurons over layers, with an optional row for the rest of the residual stream."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax

from tljax.cache import access
from tljax.cache.slices import SliceInput
from tljax.cache.writers import Part, Pieces, read_parts

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache


def stack_units(
    cache: "ActivationCache",
    what: str,
    names: Sequence[str],
    make_parts: Callable[[], Sequence[Part]],
    last: int,
    *,
    pos_axis: int,
    incl_remainder: bool,
    pos_slice: SliceInput,
    apply_ln: bool,
    projection: jax.Array | None = None,
) -> jax.Array:
    """Stacks parts of the residual stream before layer ``last``.

    Args:
        cache: the cache.
        what: the calling method's name, for error messages.
        names: the activations that the parts are computed from.
        make_parts: makes the parts; called once those activations are known to be in the cache.
        last: the layer; ``n_layers`` means the end.
        pos_axis: the position axis of the first of ``names``.
        incl_remainder: add a row with the rest of the stream.
        pos_slice: positions to keep.
        apply_ln: divide by the scale of the norm that reads the stream there.
        projection: directions ``[d_model, direction]`` to project onto.

    Returns:
        ``[part, batch, pos, d_model or direction]``. Without parts (``last`` is 0), no row or only the rest.
    """
    cfg = cache.cfg
    access.refuse_norms_of_the_stream(cfg, what)
    access.refuse_dictionaries(cfg, what)
    scale = access.scale_name(cfg, last) if apply_ln else None
    stream = access.stream_name(cache, last)
    needs_stream = incl_remainder or not names
    access.require(cache, [*names, *([scale] if scale else []), *([stream] if needs_stream else [])], what)
    reader = access.reader_of(cache, last, False, apply_ln, projection)
    parts = tuple(make_parts()) if names else (Pieces((cache[stream],)),)
    taken = access.position_cut(cache, pos_slice, cache[names[0] if names else stream], pos_axis if names else -2)
    rest_of = cache[stream] if incl_remainder and names else None
    stack = read_parts(
        parts, reader, taken, rest_of, cfg=cfg.computation, centred=apply_ln and access.centres(cfg, last)
    )
    return stack if names or incl_remainder else stack[:0]
