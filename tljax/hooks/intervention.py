"""Base class of interventions: selects the entries to change and aligns operands with the activation."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.checks import missing
from tljax.errors import InterventionError, nearest
from tljax.hooks.point import HookPoint
from tljax.hooks.points import AXES
from tljax.hooks.selectors import AXIS_ALIASES, Selector
from tljax.text import positions


class Intervention:
    """Base class of interventions: selects the entries to change and aligns operands with the activation.

    Args:
        mask: boolean array that broadcasts to the activation; only ``True`` entries change.
        **at: axis name to a number, a list of numbers, a boolean mask of that axis, or a slice. The axes are those of
            the hook point: ``batch``, ``pos``, ``head``, ``d_head``, ``d_model``, ``neuron``, ``query_pos``,
            ``key_pos``, ``d_vocab``. On attention patterns ``pos`` means ``query_pos``. A position may also be
            ``"prompt"`` or ``"new"``, the tokens that generation adds. Positions count in each prompt's own text where
            its padding is known: ``pos=-1`` is the last token of each.

    Raises:
        InterventionError: an axis name is unknown or an index is malformed.
    """

    arrays: ClassVar[tuple[str, ...]] = ()
    apart: ClassVar[tuple[str, ...]] = ()
    """The ``arrays`` whose axes are not those of the activation."""
    optional: ClassVar[tuple[str, ...]] = ()
    """The ``arrays`` that may be ``None``."""
    settings: ClassVar[tuple[str, ...]] = ()
    at: tuple[Selector, ...]
    mask: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_pytree_with_keys(
            cls, _flatten_with_keys, lambda aux, children: _unflatten(cls, aux, children)
        )

    def __init__(self, mask: Any = None, **at: Any) -> None:
        selectors = []
        for key, index in at.items():
            axis = AXIS_ALIASES.get(key, key)
            if axis not in AXES:
                known = [*AXES, *AXIS_ALIASES]
                raise InterventionError(
                    f"{type(self).__name__} has no axis {key!r}.{nearest(key, known)} Axes: {', '.join(AXES)}."
                )
            if any(selector.axis == axis for selector in selectors):
                raise InterventionError(
                    f"{type(self).__name__} addresses axis {axis!r} twice ({key}= is another name for it)."
                )
            if index is not None:
                selectors.append(Selector(axis, index))
        self._set("at", tuple(selectors))
        self._set("mask", None if mask is None else jnp.asarray(mask).astype(jnp.float32))

    @classmethod
    def stored(cls, fields: Mapping[str, Any], at: Sequence[Selector]) -> "Intervention":
        """Builds an intervention from its parts (arrays, settings and mask by name), unchecked."""
        self = object.__new__(cls)
        for name, value in fields.items():
            self._set(name, value)
        self._set("at", tuple(at))
        return self

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise InterventionError(f"{type(self).__name__} is frozen: build a new one instead of setting {name}.")

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            return f"{value.dtype}{list(value.shape)}" if getattr(value, "ndim", 0) else str(value)

        parts = [f"{name}={show(self._shown(name))}" for name in (*self.arrays, *self.settings)]
        parts += [f"{s.axis}={show(s.payload)}" for s in self.at] + (["mask=..."] if self.mask is not None else [])
        return f"{type(self).__name__}({', '.join(parts)})"

    def _shown(self, name: str) -> Any:
        return getattr(self, name)

    def __call__(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        """Returns the changed activation, same shape and dtype."""
        self.check_axes(hook.name, hook.axes)
        self.check_shape(hook, hook.whole(value.shape))
        changed = self.transform(value, hook).astype(value.dtype)
        where = self.where(value, hook)
        changed = changed if where is None else jnp.where(where, changed, value)
        lacking = self._lacking(value, hook)
        changed = changed if lacking is None else positions.fill_nothing(changed, lacking)
        return self._refused(changed, hook)

    def _refused(self, changed: jax.Array, hook: HookPoint) -> jax.Array:
        """Returns NaN everywhere (-1 for integers) if a traced index is out of range, which cannot raise an error."""
        sizes = hook.whole(changed.shape)
        for number, selector in self._axis_numbers(hook.axes).items():
            if (exist := selector.exist(sizes[number])) is not None:
                changed = jnp.where(exist, changed, jnp.asarray(missing(changed.dtype), changed.dtype))
        return changed

    def transform(self, value: jax.Array, hook: HookPoint) -> jax.Array:
        """Returns the activation with all entries changed; the base class keeps the change at selected entries only."""
        raise NotImplementedError

    def _axis_numbers(self, axes: tuple[str, ...]) -> dict[int, Selector]:
        return {axes.index("query_pos" if s.axis == "pos" and "pos" not in axes else s.axis): s for s in self.at}

    def check_axes(self, name: str, axes: tuple[str, ...]) -> None:
        """Raises InterventionError if the hook point lacks an axis this intervention addresses."""
        if {"pos", "query_pos"} <= {selector.axis for selector in self.at} and "pos" not in axes:
            raise InterventionError(f"At {name} pos= means query_pos=: give one of them.")
        for selector in self.at:
            if selector.axis not in axes and not (selector.axis == "pos" and "query_pos" in axes):
                known = f"has axes {axes}" if axes else "has no axis names here (pass axes=)"
                raise InterventionError(
                    f"{type(self).__name__}({selector.axis}=...) cannot apply at {name}, which {known}."
                )

    def check_shape(self, hook: HookPoint, shape: Sequence[int]) -> None:
        """Raises InterventionError if an index is out of range or an operand cannot line up with ``shape``."""
        selectors = self._axis_numbers(hook.axes)
        for number, selector in selectors.items():
            selector.check(shape[number], hook.name)
        if hook.text is not None and not isinstance(hook.text, Tracer):
            text = np.asarray(hook.text)
            if (prompts := self._prompts(hook, text.shape[0])) is not None:
                text = None if isinstance(prompts, Tracer) else np.where(np.asarray(prompts)[:, None], text, True)
            for selector in selectors.values() if text is not None else ():
                selector.check_text(text, hook.name)
        if self.mask is not None and not _broadcasts(self.mask.shape, shape):
            raise InterventionError(
                f"The mask of shape {tuple(self.mask.shape)} does not broadcast to {hook.name}, shape {tuple(shape)}."
            )

    def where(self, value: jax.Array, hook: HookPoint) -> jax.Array | None:
        """Returns a boolean array that broadcasts to ``value``, ``True`` at entries that change; ``None`` means all."""
        chosen, sizes = None, hook.whole(value.shape)
        for number, selector in self._axis_numbers(hook.axes).items():
            shape = [1] * value.ndim
            shape[number] = sizes[number]
            if hook.text is not None and selector.counts_in_text:
                shape[0] = value.shape[0]
                selected = selector.text_mask(hook.text)
            else:
                selected = selector.mask(sizes[number])
            axis_mask = hook.part(selected.reshape(shape), value.shape)
            chosen = axis_mask if chosen is None else chosen & axis_mask
        if self.mask is not None:
            mask = (self.mask != 0).reshape((1,) * (value.ndim - self.mask.ndim) + self.mask.shape)
            mask = hook.part(mask, value.shape)
            chosen = mask if chosen is None else chosen & mask
        return chosen

    @property
    def counts_positions(self) -> bool:
        """Whether the intervention depends on where padding is."""
        return any(selector.counts_in_text for selector in self.at)

    def _prompts(self, hook: HookPoint, batch: int) -> jax.Array | None:
        """Returns a mask ``[batch]`` of the prompts addressed; ``None`` means all."""
        selector = next((s for s in self.at if s.axis == "batch"), None)
        return None if selector is None else selector.mask(batch)

    def _lacking(self, value: jax.Array, hook: HookPoint) -> jax.Array | None:
        """Returns a mask ``[batch, 1, ...]`` of prompts that lack a selected position, or ``None`` if none can."""
        if hook.text is None:
            return None
        found = [found for s in self.at if (found := s.lacking(hook.text)) is not None]
        if not found:
            return None
        prompts = self._prompts(hook, value.shape[0])
        lacking = functools.reduce(jnp.logical_or, found)
        lacking = lacking if prompts is None else lacking & prompts
        return lacking.reshape(-1, *(1,) * (value.ndim - 1))

    def aligned(self, operand: Any, value: jax.Array, hook: HookPoint) -> jax.Array:
        """Returns ``operand`` in a shape that broadcasts to ``value``.

        ``operand`` may broadcast to the whole activation (entries are read where they are selected), or to the
        activation without the axes addressed by a single number, or have one entry for each number of a list
        (``pos=[3, 5]`` with two rows).

        Raises:
            InterventionError: its shape fits none of these, or could be meant in two ways.
        """
        operand, sizes = jnp.asarray(operand).astype(value.dtype), hook.whole(value.shape)
        selectors = self._axis_numbers(hook.axes)
        dropped = sorted(n for n, s in selectors.items() if s.kind == "number")
        whole = (1,) * (value.ndim - operand.ndim) + operand.shape
        part = list((1,) * (value.ndim - len(dropped) - operand.ndim) + operand.shape)
        for number in dropped:
            part.insert(number, 1)
        fitting = {shape for shape in (whole, tuple(part)) if _broadcasts(shape, sizes)}
        if len(fitting) == 1:
            aligned = operand.reshape(fitting.pop())
            self._refuse_reordered(aligned, sizes, hook, selectors)
            return hook.part(aligned, value.shape)
        listed = None if fitting else self._one_entry_each(operand, (whole, tuple(part)), sizes, selectors, hook.text)
        if listed is not None:
            return hook.part(listed, value.shape)
        remaining = tuple(size for n, size in enumerate(sizes) if n not in dropped)
        problem = "could be meant in two ways at" if fitting else "does not fit"
        raise InterventionError(
            f"{type(self).__name__}'s value of shape {tuple(operand.shape)} {problem} {hook.name}: give an array with "
            f"all the axes of the activation {sizes} {hook.axes}, or one that broadcasts to the selected "
            f"part {remaining}."
        )

    def _one_entry_each(
        self,
        operand: jax.Array,
        shapes: Sequence[tuple[int, ...]],
        sizes: Sequence[int],
        selectors: Mapping[int, Selector],
        text: Any,
    ) -> jax.Array | None:
        """Scatters ``operand`` to the entries of the one axis addressed by a list; ``None`` if it does not fit."""
        listed = [(n, s) for n, s in selectors.items() if s.kind == "numbers"]
        if len(listed) != 1:
            return None
        number, selector = listed[0]
        expected = list(sizes)
        expected[number] = selector.size
        fitting = [shape for shape in shapes if _broadcasts(shape, expected)]
        if not fitting:
            return None
        if text is not None and selector.counts_in_text:
            return _entries_in_text(jnp.broadcast_to(operand.reshape(fitting[0]), expected), number, selector, text)
        index = (slice(None),) * number + (selector.numbers(sizes[number]),)
        return (
            jnp.zeros(tuple(sizes), operand.dtype)
            .at[index]
            .set(jnp.broadcast_to(operand.reshape(fitting[0]), expected))
        )

    def _refuse_reordered(
        self, aligned: jax.Array, sizes: Sequence[int], hook: HookPoint, selectors: Mapping[int, Selector]
    ) -> None:
        """Raises InterventionError if a list names all entries out of order: the operand's order is then ambiguous."""
        for number, selector in selectors.items():
            size = sizes[number]
            if selector.kind == "numbers" and selector.size == size == aligned.shape[number] > 1:
                numbers = selector.payload
                if not isinstance(numbers, Tracer) and (np.asarray(numbers) != np.arange(size)).any():
                    raise InterventionError(
                        f"{selector.axis}= lists all {size} entries at {hook.name} out of order: list them in order, "
                        "with the value's rows to match."
                    )


def _entries_in_text(operand: jax.Array, axis: int, selector: Selector, text: jax.Array) -> jax.Array:
    """Puts entries ``[batch, ..., n, ...]``, one for each of ``n`` positions, where each prompt has these positions."""
    places, _ = positions.find(text, jnp.asarray(selector.payload).astype(jnp.int32))
    entry = (places[:, None, :] == jnp.arange(text.shape[-1])[None, :, None]).argmax(axis=-1)  # [batch, pos]
    shape = [1] * operand.ndim
    shape[0], shape[axis] = entry.shape
    return jnp.take_along_axis(operand, entry.reshape(shape), axis=axis)


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    try:
        return np.broadcast_shapes(tuple(shape), tuple(target)) == tuple(target)
    except ValueError:
        return False


def _flatten_with_keys(self: Intervention) -> tuple[list[tuple[Any, Any]], Any]:
    keys = [*self.arrays, "mask", *(s.axis for s in self.at if not s.is_static)]
    children = [getattr(self, name) for name in self.arrays] + [self.mask]
    children += [s.payload for s in self.at if not s.is_static]
    keyed = [(jax.tree_util.GetAttrKey(key), child) for key, child in zip(keys, children, strict=True)]
    aux = (tuple(s.signature() for s in self.at), tuple(getattr(self, name) for name in self.settings))
    return keyed, aux


def _unflatten(cls: type[Intervention], aux: Any, children: Iterable[Any]) -> Intervention:
    children = tuple(children)
    signatures, settings = aux
    names = (*cls.arrays, "mask")
    payloads = iter(children[len(names) :])
    selectors = [
        Selector.stored(axis, kind, _static_payload(kind, static) if kind in ("slice", "span") else next(payloads))
        for axis, kind, static in signatures
    ]
    fields = dict(zip(names, children, strict=False)) | dict(zip(cls.settings, settings, strict=True))
    return cls.stored(fields, selectors)


def _static_payload(kind: str, static: Any) -> Any:
    return slice(*static) if kind == "slice" else static


def number_leaf(value: Any, what: str = "An intervention") -> Any:
    """Returns a value as a float leaf; Python scalars become NumPy, so that a new number reuses the compiled program.

    Raises:
        InterventionError: the value is not a number or an array of numbers; the message names its owner, ``what``.
    """
    if isinstance(value, jax.Array):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InterventionError(f"{what} takes a number or an array of numbers, got rows of unequal length.") from error
    if array.dtype.kind in "OUSMm":
        fix = "To set entries to zero use tljax.Zero." if value is None else f"Convert it, such as {what}(2.0)."
        raise InterventionError(
            f"{what} takes a number or an array of numbers, got {type(value).__name__} {str(value)[:60]!r}. {fix}"
        )
    wide = np.float64 if jax.config.read("jax_enable_x64") else np.float32
    return array.astype(wide) if array.dtype.kind in "iuf" and array.dtype.itemsize != 2 else array
