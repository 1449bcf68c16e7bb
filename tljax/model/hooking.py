"""Methods that add, remove and list the hooks of a model, and that list its hook points."""

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.hooks.dictionary import Direction, HookDictionary, UnusedHooksWarning
from tljax.hooks.listing import HookPointList
from tljax.hooks.names import select
from tljax.hooks.points import point_table
from tljax.typing import HookList

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer


class HookContext:
    """The context manager that :meth:`HookedTransformer.hooks` returns; its value is the hooked model."""

    def __init__(self, hooked: "HookedTransformer") -> None:
        self._hooked: HookedTransformer | None = hooked
        self._kept = weakref.ref(hooked)

    def __enter__(self) -> "HookedTransformer":
        assert self._hooked is not None
        hooked, self._hooked = self._hooked, None
        return hooked

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._kept() is None:
            warnings.warn(
                "These hooks were never used: a tljax model does not change, so the block ran the model without them. "
                "Write `with model.hooks(...) as hooked:` and call hooked.",
                UnusedHooksWarning,
                stacklevel=2,
            )


class HookMethods:
    """Methods for hooks that stay on a model; each returns a new model."""

    cfg: HookedTransformerConfig
    _hooks: HookDictionary

    @typed
    def hook_points(self, batch: int | None = None, pos: int | None = None) -> HookPointList:
        """Lists every hook point in firing order: name, axes, shape, meaning. Runs nothing.

        Args:
            batch: batch size for the shapes shown; ``None`` shows the axis name.
            pos: sequence length for the shapes shown; ``None`` shows the axis name.
        """
        return HookPointList(point_table(self.cfg).values(), batch, pos)

    @typed
    def add_hook(
        self,
        name: Any,
        hook: Callable[..., Any],
        dir: Direction = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> "HookedTransformer":
        """Returns a model with one more hook, at a name, a list of names or a predicate on names.

        Args:
            name: the hook point or points.
            hook: a function of ``(activation, hook)`` that returns a new activation or ``None``, or an intervention.
            dir: ``"bwd"`` gives the function the gradient instead, inside ``jax.grad``.
            is_permanent: keep the hook in ``reset_hooks()``.
            prepend: run before the hooks already there.
        """
        return self._with_hooks(self._add([(name, hook)], dir, is_permanent, prepend))

    @typed
    def add_perma_hook(self, name: Any, hook: Callable[..., Any], dir: Direction = "fwd") -> "HookedTransformer":
        """Returns a model with a hook that ``reset_hooks()`` keeps."""
        return self.add_hook(name, hook, dir, is_permanent=True)

    @typed
    def remove_hook(self, name: Any, dir: str = "both", including_permanent: bool = True) -> "HookedTransformer":
        """Returns a model without the hooks at a name, a list of names or a predicate."""
        names = select(name, point_table(self.cfg), self.cfg.n_layers)
        return self._with_hooks(self._hooks.without(names, dir, including_permanent))

    @typed
    def reset_hooks(self, direction: str = "both", including_permanent: bool = False) -> "HookedTransformer":
        """Returns a model without hooks; permanent ones stay unless asked for."""
        return self._with_hooks(self._hooks.without(None, direction, including_permanent))

    def list_hooks(self) -> dict[str, list[Callable[..., Any]]]:
        """Returns the hooks this model carries, by name."""
        return {name: [e.function for e in entries] for name, entries in self._hooks.by_name().items()}

    @typed
    def hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = ()) -> "HookContext":
        """Returns a context manager: ``with model.hooks(fwd_hooks=[...]) as hooked:``. ``model`` itself never changes.

        Warns:
            UnusedHooksWarning: the ``as hooked`` was forgotten, so that nothing in the block ran with the hooks.
        """
        return HookContext(self.with_hooks(fwd_hooks, bwd_hooks))

    @typed
    def with_hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = ()) -> "HookedTransformer":
        """Returns a model with more hooks: ``[(name | names | predicate, callable), ...]`` each way."""
        model = self._with_hooks(self._add(fwd_hooks)) if fwd_hooks else cast("HookedTransformer", self)
        return model._with_hooks(model._add(bwd_hooks, "bwd")) if bwd_hooks else model

    def _add(
        self, hooks: HookList, direction: Direction = "fwd", permanent: bool = False, prepend: bool = False
    ) -> HookDictionary:
        table = point_table(self.cfg)
        return self._hooks.add(hooks, table, self.cfg.n_layers, direction, permanent, prepend)

    def _with_hooks(self, hooks: HookDictionary) -> "HookedTransformer":
        model = cast("HookedTransformer", self)
        hooked = model._make(model.cfg, model.params, hooks, model._tokenizer)
        hooked.__dict__["_transposed"] = model._transposed
        return hooked

    def _set_flag(self, name: str, value: bool) -> "HookedTransformer":
        return cast("HookedTransformer", self).replace(cfg=self.cfg.replace(**{name: value}))

    def set_use_attn_result(self, value: bool) -> "HookedTransformer":
        """Returns a model whose full caches include ``attn.hook_result`` (naming it in a filter needs no switch)."""
        return self._set_flag("use_attn_result", value)

    def set_use_split_qkv_input(self, value: bool) -> "HookedTransformer":
        """Returns a model whose full caches include ``hook_q_input``, ``hook_k_input`` and ``hook_v_input``."""
        return self._set_flag("use_split_qkv_input", value)

    def set_use_attn_in(self, value: bool) -> "HookedTransformer":
        """Returns a model whose full caches include ``hook_attn_in``."""
        return self._set_flag("use_attn_in", value)

    def set_use_hook_mlp_in(self, value: bool) -> "HookedTransformer":
        """Returns a model whose full caches include ``hook_mlp_in``."""
        return self._set_flag("use_hook_mlp_in", value)
