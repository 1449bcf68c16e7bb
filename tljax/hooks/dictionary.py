"""The immutable hook dictionary: which callables sit at which hook points, in the order they were added."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax

from tljax.errors import HookError, UnknownHookError
from tljax.hooks.intervention import Intervention
from tljax.hooks.interventions import Replace
from tljax.hooks.names import select
from tljax.hooks.point import HookPoint, HookSlot, check_numbers
from tljax.hooks.points import HookPointSpec, HookTable

Direction = Literal["fwd", "bwd"]


class UnusedHooksWarning(UserWarning):
    """Hooks that nothing calls: a ``with model.hooks(...)`` block did not keep its model, or there is no gradient."""


@dataclasses.dataclass(frozen=True)
class HookEntry:
    """One callable at one hook point.

    Attributes:
        name: full name of the point.
        function: takes ``(activation, hook)`` (or ``(gradient, hook)`` when ``direction`` is ``"bwd"``).
        direction: ``"fwd"`` or ``"bwd"``.
        permanent: survives ``reset_hooks()``.
    """

    name: str
    function: Callable[..., Any]
    direction: Direction = "fwd"
    permanent: bool = False


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class HookDictionary:
    """Hooks in order. A pytree: the arrays inside interventions are leaves, everything else is structure."""

    entries: tuple[HookEntry, ...] = ()

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        slots = tuple(HookSlot(HookPoint(e.name), (e.function,)) for e in self.entries)
        return slots, tuple((e.name, e.direction, e.permanent) for e in self.entries)

    @classmethod
    def tree_unflatten(cls, aux: Any, slots: Sequence[Any]) -> "HookDictionary":
        return cls(tuple(
            HookEntry(name, slot.forward[0] if isinstance(slot, HookSlot) else slot, direction, permanent)
            for slot, (name, direction, permanent) in zip(slots, aux, strict=True)
        ))  # fmt: skip

    def __len__(self) -> int:
        return len(self.entries)

    def add(
        self,
        hooks: Iterable[tuple[Any, Callable[..., Any]]],
        table: HookTable,
        n_layers: int,
        direction: Direction = "fwd",
        permanent: bool = False,
        prepend: bool = False,
    ) -> "HookDictionary":
        """Returns a dictionary with more hooks.

        Raises:
            UnknownHookError: a name matches no point.
            HookError: an item is not a (name, callable) pair.
            InterventionError: an intervention addresses an axis its point does not have.
        """
        if direction not in ("fwd", "bwd"):
            raise HookError(f"A hook's direction is 'fwd' or 'bwd', got {direction!r}.")
        new: list[HookEntry] = []
        for item in hooks:
            name, function = _pair(item)
            for full_name in select(name, table, n_layers):
                if isinstance(function, Intervention):
                    function.check_axes(table[full_name].name, table[full_name].axes)
                new.append(HookEntry(full_name, function, direction, permanent))
        return HookDictionary((*new, *self.entries) if prepend else (*self.entries, *new))

    def without(
        self, names: Iterable[str] | None = None, direction: str = "both", including_permanent: bool = False
    ) -> "HookDictionary":
        """Returns a dictionary without the hooks at ``names`` (``None``: everywhere) of a direction."""
        if direction not in ("fwd", "bwd", "both"):
            raise HookError(f"direction is 'fwd', 'bwd' or 'both', got {direction!r}.")
        chosen = None if names is None else set(names)
        return HookDictionary(tuple(
            e for e in self.entries
            if (chosen is not None and e.name not in chosen)
            or direction not in ("both", e.direction)
            or (e.permanent and not including_permanent)
        ))  # fmt: skip

    def by_name(self) -> dict[str, list[HookEntry]]:
        grouped: dict[str, list[HookEntry]] = {}
        for entry in self.entries:
            grouped.setdefault(entry.name, []).append(entry)
        return grouped

    def check(self, table: Mapping[str, HookPointSpec], batch: int, pos: int, text: Any = None) -> None:
        """Checks every intervention's indices and value shapes against the shapes of this run.

        ``text`` is the run's padding mask ``[batch, pos]``, ``True`` at text, if it is known.

        Raises:
            InterventionError: an index is out of range, or a value does not fit.
        """
        for entry in self.entries:
            if isinstance(entry.function, Intervention):
                spec = table[entry.name]
                entry.function.check_shape(HookPoint(entry.name, spec.axes, text=text), spec.shape(batch, pos))
                if isinstance(entry.function, Replace):
                    check_numbers(entry.function.value, entry.name, spec.below)


def _pair(item: Any) -> tuple[Any, Callable[..., Any]]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise HookError(
            f"Each hook is a (name, callable) pair, got {type(item).__name__}. "
            'Write fwd_hooks=[("blocks.0.hook_resid_post", my_hook)], a list of tuples.'
        )
    name, function = item
    if name is None:
        raise UnknownHookError("A hook needs a name, a list of names or a predicate on names; None means every point.")
    if not callable(function):
        raise HookError(
            f"The hook at {name!r} is not callable, got {type(function).__name__}. Pass a function of "
            "(activation, hook) or an intervention such as tljax.Zero(pos=3); to put an array "
            "there use tljax.Replace(array)."
        )
    return name, function


def make_slot(relative: str, spec: HookPointSpec, full_name: str, entries: Sequence[HookEntry]) -> HookSlot:
    """Builds the slot of one point for one run.

    Interventions get only the block-relative name, so that moving one to another layer recompiles nothing; any other
    callable gets the full name.
    """
    anonymous = all(isinstance(entry.function, Intervention) for entry in entries)
    point = HookPoint(relative if anonymous else full_name, spec.axes, below=spec.below)
    return HookSlot(
        point,
        tuple(entry.function for entry in entries if entry.direction == "fwd"),
        tuple(entry.function for entry in entries if entry.direction == "bwd"),
    )
