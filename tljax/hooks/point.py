"""Hook points: ``HookPoint``, which hook functions receive, and ``hook``, which opens one inside a Flax module."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.elsewhere import POINT, SaysWhatInstead
from tljax.errors import HookError
from tljax.processes import put_like, readable

HOOKS = "hooks"
CAPTURED = "intermediates"
SPLICES = "splices"
POSITION_AXES = ("pos", "query_pos", "key_pos")


class LayerIndex(int):
    """A layer number that can also be called, because TransformerLens code writes ``hook.layer()``."""

    def __call__(self) -> int:
        return int(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """Part of a longer text that an activation holds, as in generation; interventions address the whole text.

    Attributes:
        start: position of the activation's first token, an int32 scalar.
        size: how many positions the text has room for.
    """

    start: Any
    size: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class HookPoint(SaysWhatInstead):
    """Description of an activation, which a hook function receives along with it.

    Attributes:
        name: full name, such as ``"blocks.3.attn.hook_z"``. Interventions compiled into a block get only
            ``"attn.hook_z"``: a block does not know its index, so that layers share one executable.
        axes: one axis name for each dimension, such as ``("batch", "pos", "head", "d_head")``; empty when unknown.
        window: the part of the text that the activation holds; ``None`` means all of it.
        below: if the activation holds indices (token ids, experts), how many values they can take.
        text: mask ``[batch, pos]`` of the whole text, ``False`` at padding, by which interventions count positions;
            ``None`` if nothing is padded or it is not known.
    """

    name: str
    axes: tuple[str, ...] = ()
    window: Window | None = dataclasses.field(default=None, compare=False)
    below: int | None = None
    text: Any = dataclasses.field(default=None, compare=False)
    _instead = POINT

    @property
    def layer(self) -> LayerIndex | None:
        """Layer number for a point inside a block (``hook.layer`` and ``hook.layer()`` both read it), else ``None``."""
        first, _, rest = self.name.partition(".")
        index, _, _ = rest.partition(".")
        return LayerIndex(index) if first == "blocks" and index.isdigit() else None

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape that an activation of ``shape`` would have for the whole text."""
        if self.window is None:
            return tuple(shape)
        return tuple(
            self.window.size if axis in POSITION_AXES else size for axis, size in zip(self.axes, shape, strict=True)
        )

    def part(self, array: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Slices an array for the whole text (or one that broadcasts to it) to the part that ``shape`` holds."""
        if self.window is None:
            return array
        for number, axis in enumerate(self.axes):
            if axis in POSITION_AXES and array.shape[number] == self.window.size != shape[number]:
                start = 0 if axis == "key_pos" else self.window.start
                array = jax.lax.dynamic_slice_in_dim(array, start, shape[number], number)
        return array


def is_compiled(function: Callable[..., Any]) -> bool:
    """Whether a callable is a pytree (an intervention, ``jax.tree_util.Partial``) and so can be compiled in."""
    return not jax.tree_util.all_leaves([function])


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class HookSlot:
    """State of one hook point during one run: its callables, and whether its value is recorded.

    A pytree whose leaves are the arrays inside compiled callables. Plain Python callables are part of its structure.
    """

    point: HookPoint
    forward: tuple[Callable[..., Any], ...] = ()
    backward: tuple[Callable[..., Any], ...] = ()
    captured: bool = False
    window: Window | None = None
    text: Any = None

    def apply(self, value: Any) -> Any:
        """Runs the forward callables in order, then attaches the backward ones to the gradient."""
        point = self.point
        if self.window is not None or self.text is not None:
            point = dataclasses.replace(point, window=self.window, text=self.text)
        for function in self.forward:
            value = call_hook(function, value, point)
        return attach_backward(value, self.backward, point) if self.backward else value

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        split = [_Static(f) if not is_compiled(f) else None for f in (*self.forward, *self.backward)]
        children = tuple(
            None if static else f for f, static in zip((*self.forward, *self.backward), split, strict=True)
        )
        return (*children, self.window, self.text), (self.point, tuple(split), len(self.forward), self.captured)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Sequence[Any]) -> "HookSlot":
        point, split, n_forward, captured = aux
        *children, window, text = children
        functions = tuple(s.function if s else child for s, child in zip(split, children, strict=True))
        return cls(point, functions[:n_forward], functions[n_forward:], captured, window, text)


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """A Python callable inside a treedef, equal only to itself."""

    function: Callable[..., Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and other.function is self.function

    def __hash__(self) -> int:
        return id(self.function)


def leaked_tracer(name: str) -> HookError:
    """Returns the error for a hook that used a value which outlived its trace."""
    return HookError(
        f"The hook at {name} used a value that an earlier compiled run left behind (a leaked tracer). Inside "
        "jax.jit, grad and vmap, and inside a Partial, a hook must not store activations in outside variables: "
        "return them through run_with_cache(names_filter=...), or use a plain function outside jit."
    )


_TORCH_SPELLINGS = {
    "detach": "leave .detach() out; nothing is recorded unless jax.grad runs, and jax.lax.stop_gradient(act) stops it",
    "norm": "write jnp.linalg.norm(act, axis=-1)",
    "topk": "write jax.lax.top_k(act, k)",
    "numpy": "write np.asarray(act)",
    "cpu": "write np.asarray(act), or run_with_cache(..., device='cpu')",
    "unsqueeze": "write act[None], or jnp.expand_dims(act, axis)",
    "float": "write act.astype(jnp.float32)",
}
"""Replacements for methods that torch's tensors have and JAX's arrays lack."""


def call_hook(function: Callable[..., Any], value: Any, point: HookPoint) -> Any:
    """Calls one hook and returns the value that the model continues with.

    Raises:
        HookError: the hook assigned in place, returned another shape or kind, or used a value that outlived its trace.
    """
    try:
        given = value if is_compiled(function) else readable(value)
        result = function(given, point)
        return value if result is None else put_like(check_result(result, given, point), value)
    except HookError:
        raise
    except jax.errors.UnexpectedTracerError as error:
        raise leaked_tracer(point.name) from error
    except TypeError as error:
        if "immutable" not in str(error) and "item assignment" not in str(error):
            error.add_note(f"(raised in the hook at {point.name})")
            raise
        raise HookError(
            f"The hook at {point.name} assigned into the activation. JAX arrays cannot change in place: return "
            "act.at[:, 3].set(0) instead of writing act[:, 3] = 0, or use tljax.Zero(pos=3)."
        ) from error
    except Exception as error:
        error.add_note(f"(raised in the hook at {point.name}, on an activation of shape {tuple(value.shape)})")
        if isinstance(error, AttributeError) and error.name in _TORCH_SPELLINGS:
            error.add_note(f"(JAX: {_TORCH_SPELLINGS[error.name]})")
        raise


def check_result(result: Any, value: Any, point: HookPoint) -> Any:
    """Returns ``result`` as an array that can stand in for ``value``, with ``value``'s dtype."""
    try:
        result = jnp.asarray(result)
    except TypeError as error:
        raise HookError(
            f"The hook at {point.name} returned {type(result).__name__}. Return the new activation "
            f"(an array of shape {tuple(value.shape)}) or None to leave it unchanged."
        ) from error
    if result.shape != value.shape:
        axes = f" {point.axes}" if point.axes else ""
        raise HookError(
            f"The hook at {point.name} returned shape {tuple(result.shape)}; the activation has shape "
            f"{tuple(value.shape)}{axes}. A hook must keep the shape."
        )
    same_kind = jnp.issubdtype(result.dtype, jnp.floating) == jnp.issubdtype(value.dtype, jnp.floating)
    if not same_kind:
        raise HookError(f"The hook at {point.name} returned dtype {result.dtype}; the activation is {value.dtype}.")
    check_numbers(result, point.name, point.below)
    return result.astype(value.dtype)


def check_numbers(numbers: Any, name: str, below: int | None) -> None:
    """Raises HookError if an index (of a token, of an expert) is not a whole number from 0 to ``below - 1``.

    Traced values are not checked: an index out of range then leads to NaN.
    """
    if below is None or isinstance(numbers, Tracer):
        return
    found = np.asarray(numbers)
    if len(wrong := found[~((found >= 0) & (found < below) & (found % 1 == 0))]):
        raise HookError(
            f"A hook at {name} puts {wrong[0]} there: its numbers are whole, and run from 0 to {below - 1}."
        )


def attach_backward(value: Any, functions: tuple[Callable[..., Any], ...], point: HookPoint) -> Any:
    """Returns ``value`` unchanged, with ``functions`` applied to the gradient that later flows back through it."""
    leaves, treedef = jax.tree.flatten(functions)
    is_array = [not callable(leaf) for leaf in leaves]
    static = [leaf for leaf, array in zip(leaves, is_array, strict=True) if not array]

    @jax.custom_vjp
    def identity(x: Any, arrays: list[Any]) -> Any:
        return x

    def forward(x: Any, arrays: list[Any]) -> tuple[Any, list[Any]]:
        return x, arrays

    def backward(arrays: list[Any], gradient: Any) -> tuple[Any, None]:
        arrays_left, static_left = iter(arrays), iter(static)
        merged = [next(arrays_left) if array else next(static_left) for array in is_array]
        for function in jax.tree.unflatten(treedef, merged):
            gradient = call_hook(lambda value, hook, function=function: _alone(function(value, hook)), gradient, point)
        return gradient, None

    identity.defvjp(forward, backward)
    return identity(value, [leaf for leaf, array in zip(leaves, is_array, strict=True) if array])


def _alone(result: Any) -> Any:
    """Returns the gradient of a backward hook that returns it in a tuple, ``(gradient,)``, as PyTorch's do."""
    return result[0] if isinstance(result, tuple) and len(result) == 1 else result


def hook(module: nn.Module, name: str, value: Any) -> Any:
    """Opens a hook point inside a Flax module: ``x = hook(self, "hook_z", x)``.

    Applies the run's hooks for this name under the module's path, then records the value if the run caches it, so the
    cache shows the value that the model continues with. Then a dictionary that is spliced in here takes over
    (:mod:`tljax.hooks.splices`). Does nothing if the run does not name the point and there is no dictionary.

    Args:
        module: the Linen module being called (``self``).
        name: the point's name inside that module.
        value: the activation.

    Returns:
        The activation to continue with.
    """
    slot = module.get_variable(HOOKS, name)
    if slot is not None:
        value = slot.apply(value)
        if slot.captured:
            module.sow(CAPTURED, name, value, init_fn=lambda: None, reduce_fn=lambda _, latest: latest)
    assert module.scope is not None
    splicing: Any = module.scope.root.get_variable(SPLICES, "run")
    return value if splicing is None else splicing.after(module, name, value)


def is_hooked(module: nn.Module, *names: str) -> bool:
    """Whether this run named any of the module's points: optional points are computed only then."""
    return any(module.get_variable(HOOKS, name) is not None for name in names)


def apply_with_slots(
    module: nn.Module,
    variables: Mapping[str, Any],
    slots: Mapping[str, HookSlot],
    *args: Any,
    method: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Applies a Linen module, or one of its methods, with hook slots given by dotted path.

    Returns:
        The output, and the captured values by dotted path.
    """
    collection: dict[str, Any] = {}
    for name, slot in slots.items():
        path, last = _split(name)
        scope = collection
        for part in path:
            scope = scope.setdefault(part, {})
        scope[last] = slot
    output, state = module.apply({**variables, HOOKS: collection}, *args, mutable=[CAPTURED], method=method)
    return output, _flatten(dict(state).get(CAPTURED, {}))


def _split(name: str) -> tuple[list[str], str]:
    """Splits a dotted path into modules and the point's name: from its first part that starts with ``hook_``."""
    parts = name.split(".")
    first = next((number for number, part in enumerate(parts) if part.startswith("hook_")), len(parts) - 1)
    return parts[:first], ".".join(parts[first:])


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def run_module_with_hooks(
    module: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    fwd_hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
    names: Sequence[str] = (),
    axes: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Runs any Flax module that calls :func:`hook`, with hooks and captures given by dotted path.

    Args:
        module: an unbound Linen module.
        variables: its variables, ``{"params": ...}``.
        *args: its inputs.
        fwd_hooks: ``(name, callable)`` pairs; names are module paths joined by dots, ``"encoder.hook_out"``.
        names: points to capture.
        axes: axis names of points, for interventions that address axes.

    Returns:
        The module's output, and a dict from name to captured activation.

    Raises:
        HookError: a named point never fired.

    >>> class Doubler(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return hook(self, "hook_out", 2 * x)
    >>> run_module_with_hooks(Doubler(), {}, jnp.ones(2), fwd_hooks=[("hook_out", lambda x, hook: x + 1)])[0]
    Array([3., 3.], dtype=float32)
    """
    wanted = dict.fromkeys([name for name, _ in fwd_hooks] + list(names))
    slots = {
        name: HookSlot(
            HookPoint(name, (axes or {}).get(name, ())),
            forward=tuple(function for hooked, function in fwd_hooks if hooked == name),
            captured=True,
        )
        for name in wanted
    }
    output, captured = apply_with_slots(module, {"params": variables.get("params", {})}, slots, *args)
    if silent := [name for name in wanted if name not in captured]:
        raise HookError(
            f"No hook point named {silent} fired in {type(module).__name__}. Names are module paths: a.b.hook_x."
        )
    return output, {name: captured[name] for name in names}
