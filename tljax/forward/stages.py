"""One compiled step of the forward pass: the embedding, a block, or the unembedding, with hooks and captures inside.

The compiled unit is the block. Its executable depends on the module, the captured names and the structure of its
hooks, never on the layer's index or on any number, so equal-shaped layers share it and new values reuse it. Plain
Python hooks run between compiled programs on concrete arrays.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from tljax.dictionary_params import DICTIONARIES
from tljax.forward.streamed import run_streamed
from tljax.hooks.intervention import Intervention
from tljax.hooks.interventions import Replace
from tljax.hooks.point import SPLICES, HookPoint, HookSlot, apply_with_slots, is_compiled, leaked_tracer
from tljax.hooks.splices import Splicing
from tljax.modules.block import TransformerBlock
from tljax.modules.context import AttentionContext
from tljax.modules.embedding import EmbeddingStage
from tljax.modules.products import LAYOUTS
from tljax.numerics import matmul_precision
from tljax.offload import HostBlock
from tljax.quantized_weight import made_after
from tljax.splice import Splice
from tljax.typing import Params


@dataclasses.dataclass(frozen=True)
class Stage:
    """One compiled step of the forward pass.

    Attributes:
        module: the Linen module.
        variables: what the module reads: its parameters, and other layouts of some of them. Parameters on the host
            (:class:`~tljax.offload.HostBlock`) are placed when the stage runs.
        prefix: the start of its points' full names.
        captured: points to record, by relative name, in firing order.
        slots: hooks by relative name, in firing order.
        repeated: hooked points that fire several times.
        entry: the point that fires first, on the stage's input; ``None`` if there is none.
        exit: the point whose value is the stage's output; ``None`` if there is none.
    """

    module: nn.Module
    variables: Mapping[str, Any]
    prefix: str
    captured: tuple[str, ...]
    slots: dict[str, HookSlot]
    entry: str | None = None
    exit: str | None = None
    repeated: frozenset[str] = frozenset()


def _apply(
    module: Any,
    captured: tuple[str, ...],
    variables: Mapping[str, Params],
    slots: Mapping[str, HookSlot],
    inputs: tuple[Any, ...],
) -> tuple[Any, dict[str, Any]]:
    slots = dict(slots)
    for name in captured:
        slots[name] = dataclasses.replace(slots.get(name, HookSlot(HookPoint(name))), captured=True)
    if isinstance(module, TransformerBlock | EmbeddingStage) and module.splices:
        variables = _with_dictionaries(variables, module.splices, inputs[1])
    if isinstance(module, TransformerBlock):
        variables = {**variables, "params": made_after(variables["params"], inputs[0])}
    with matmul_precision(module.cfg):
        return apply_with_slots(module, variables, slots, *inputs)


def _with_dictionaries(
    variables: Mapping[str, Params], splices: Sequence[Splice], context: AttentionContext
) -> dict[str, Any]:
    """Returns what a module reads with the dictionaries among its parameters as a :class:`Splicing`, for this call."""
    own, layouts = dict(variables["params"]), dict(variables.get(LAYOUTS, {}))
    other = layouts.pop(DICTIONARIES, {})
    dictionaries = {name: one.laid_out(other.get(name, {})) for name, one in own.pop(DICTIONARIES).items()}
    splicing = Splicing(splices, dictionaries, context.tokens, context.computed)
    return {**variables, "params": own, LAYOUTS: layouts, SPLICES: {"run": splicing}}


_apply_compiled = jax.jit(_apply, static_argnums=(0, 1))
_apply_recomputed = jax.jit(jax.checkpoint(_apply, static_argnums=(0, 1)), static_argnums=(0, 1))
"""The same, for derivatives: a backward pass keeps its inputs alone and computes everything between them again."""


def run_stage(stage: Stage, inputs: tuple[Any, ...], traced: bool, remat: bool = False) -> tuple[Any, dict[str, Any]]:
    """Runs one stage.

    Args:
        stage: what to run.
        inputs: arguments of its module; the first is the activation that flows through.
        traced: whether the run is part of a caller's trace.
        remat: whether a backward pass recomputes the stage instead of keeping what it computed; a stage with plain
            Python hooks is kept all the same, because these see concrete gradients only while nothing is recomputed.

    Returns:
        The stage's output, and the captured activations by relative name.
    """
    slots = stage.slots
    python_forward = [name for name, slot in slots.items() if not all(map(is_compiled, slot.forward))]
    python_backward = any(not all(map(is_compiled, slot.backward)) for slot in slots.values())
    own = stage.variables.get("params")
    if isinstance(own, HostBlock):
        if not python_forward and not python_backward:
            rest = {name: part for name, part in stage.variables.items() if name != "params"}
            apply = _apply, _apply_compiled
            return run_streamed(apply, stage.module, stage.captured, own, rest, slots, inputs)
        stage = dataclasses.replace(stage, variables={**stage.variables, "params": own.blocks.place(own.layer)})
    if python_backward or not stage.repeated.isdisjoint(python_forward) or (traced and python_forward):
        return _apply(stage.module, stage.captured, stage.variables, slots, inputs)
    try:
        if python_forward:
            return _run_with_python_hooks(stage, python_forward, inputs)
        apply = _apply_recomputed if remat else _apply_compiled
        return apply(stage.module, stage.captured, stage.variables, slots, inputs)
    except jax.errors.UnexpectedTracerError as error:
        raise leaked_tracer(stage.prefix + " or ".join(slots)) from error


def _run_with_python_hooks(stage: Stage, hooked: Sequence[str], inputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """Runs a stage that has plain Python hooks, which get concrete arrays and may do anything.

    The compiled stage records each such point; the function is called on the value; only if it returned a new one does
    the stage run again with that value put in place, so reading costs nothing and writing costs one more block. Hooks
    at the stage's first and last point need no second run.
    """
    slots = dict(stage.slots)
    seen: dict[str, Any] = {}
    pending = list(hooked)
    if stage.entry in pending:
        inputs = (slots.pop(stage.entry).apply(inputs[0]), *inputs[1:])
        pending.remove(stage.entry)
    tails: dict[str, HookSlot] = {}
    for name in pending:
        slots[name], tails[name] = _split_at_python(name, slots[name])

    def run() -> tuple[Any, dict[str, Any]]:
        names = dict.fromkeys((*stage.captured, *pending))
        return _apply_compiled(stage.module, tuple(names), stage.variables, slots, inputs)

    output, recorded = run()
    seen |= recorded
    while pending:
        name = pending.pop(0)
        value = seen[name]
        changed = tails[name].apply(value)
        seen[name] = changed
        if changed is value:
            continue
        slots[name] = HookSlot(HookPoint(name, slots[name].point.axes), (Replace(changed),), slots[name].backward)
        if name == stage.exit:
            output = changed
        else:
            output, recorded = run()
            seen |= recorded
    return output, {name: seen[name] for name in stage.captured}


def _split_at_python(relative: str, slot: HookSlot) -> tuple[HookSlot, HookSlot]:
    """Splits a slot before its first Python function: a part to compile, and the rest to call.

    The compiled part gets the block-relative name if it holds only interventions, as in ``make_slot``.
    """
    first = next(n for n, function in enumerate(slot.forward) if not is_compiled(function))
    compiled = (*slot.forward[:first], *slot.backward)
    anonymous = all(isinstance(function, Intervention) for function in compiled)
    point = HookPoint(relative, slot.point.axes) if anonymous else slot.point
    head = dataclasses.replace(slot, point=point, forward=slot.forward[:first])
    return head, dataclasses.replace(slot, forward=slot.forward[first:], backward=())
