"""``tljax.plan``: what a run will take of each device's memory, before anything is loaded."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax

from tljax import checks
from tljax.config import HookedTransformerConfig
from tljax.errors import ConfigError, InputError
from tljax.memory import free_bytes, is_large
from tljax.model.running import reached_names
from tljax.numerics import canonical_dtype
from tljax.planning.programs import Target
from tljax.planning.result import Change, MemoryPlan
from tljax.planning.runs import MOMENTS, Run, What
from tljax.planning.shapes import read_shape
from tljax.planning.splitting import MODEL, split
from tljax.scale import ShardingRules
from tljax.text.inputs import layer_bounds
from tljax.typing import NamesFilter

Platform = Literal["cpu", "gpu", "tpu"]
_LONGEST = 2048
"""Tokens of a prompt where none are named and the model takes more."""
_ASSUMED = 16 * 2**30
"""The memory by which a sweep's pages are planned where a device's is not known."""


@checks.typed
def plan(
    model: str | os.PathLike[str] | HookedTransformerConfig | Mapping[str, Any],
    *,
    mesh_shape: int | Sequence[int] | Mapping[str, int] | None = None,
    n_devices: int | None = None,
    rules: ShardingRules | Mapping[str, Any] | None = None,
    batch: int = 1,
    pos: int | None = None,
    what: What = "forward",
    dtype: Any = None,
    names_filter: NamesFilter = None,
    stop_at_layer: int | None = None,
    remat: bool = False,
    max_new_tokens: int = 10,
    memory: int | None = None,
    platform: Platform | None = None,
) -> MemoryPlan:
    """Says what a run will take of each device's memory, and what to change if it does not fit. Nothing is loaded.

    Parameters, activations and caches are counted from their shapes. What a program takes besides is asked of the
    compiler, which gets one block, the embedding and the unembedding as shapes; this takes a second or two.

    Args:
        model: a name or alias, a directory with ``config.json``, or a config. The shapes of gpt2, Llama 3 and
            DeepSeek-V3 are known; of another model on the hub ``config.json`` is downloaded, and nothing else.
        mesh_shape: the devices: ``None`` for one, a number of devices that share the model, ``(data, model)``, or sizes
            by the names of the mesh's axes, such as ``{"fsdp": 8, "model": 4}``. They need not be at hand. Prompts are
            spread over ``data`` and ``fsdp``; heads, neurons, experts and the vocabulary over ``model``; parameters
            along ``d_model`` over ``fsdp``, gathered block by block. What does not divide is whole on every device.
        n_devices: devices that share the model, as :meth:`~tljax.HookedTransformer.from_pretrained` takes them; the
            same as that number as ``mesh_shape``.
        rules: what is split over what, as :meth:`~tljax.HookedTransformer.shard` takes them; ``None`` means what the
            names of the mesh's axes suggest.
        batch: prompts that run at once, on all devices together.
        pos: tokens of a prompt; ``None`` means ``n_ctx`` (for ``"generate"`` less the new tokens), at most 2,048.
        what: ``"forward"`` (logits), ``"cache"`` (:meth:`~tljax.HookedTransformer.run_with_cache`), ``"gradients"``
            (:meth:`~tljax.HookedTransformer.run_with_grads` of a metric of one position), ``"sweep"`` (every position
            of the points, patched), ``"generate"``, or ``"harvest"`` (``batch`` windows at once).
        dtype: of parameters and activations; ``None`` means float32 for a model's name, as it is loaded, and a config's
            own.
        names_filter: the points that are kept, differentiated at or patched, as in
            :meth:`~tljax.HookedTransformer.run_with_cache`. ``None`` means all, for sweeps and harvests every
            ``hook_resid_post``.
        stop_at_layer: the block to stop before, for ``"forward"`` and ``"cache"``.
        remat: gradients that recompute each block.
        max_new_tokens: tokens to generate.
        memory: bytes of a device; ``None`` means what is free on jax's default one, if that is of this platform.
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``, what will run it; ``None`` means that of jax's default device.
            Programs for a device that is not at hand are compiled for the CPU, in float32.

    Returns:
        The plan; printed, it is a table.

    Raises:
        CheckpointError: the model is unknown; names the nearest.
        InputError: an argument is out of range, or does not go with this run.
        ShardingError: rules and the names of the mesh's axes do not fit each other.
        UnknownHookError: a name or filter matches nothing.

    >>> import tljax
    >>> shape = {"d_model": 512, "n_heads": 8, "n_layers": 4, "n_ctx": 128, "d_vocab": 5000}
    >>> small = tljax.plan(tljax.HookedTransformerConfig(**shape), batch=8, what="cache", memory=10**9)
    >>> small.fits
    True
    """
    if n_devices is not None:
        if mesh_shape is not None:
            raise InputError("Both n_devices= and mesh_shape= say how many devices there are: give one of them.")
        mesh_shape = checks.whole(n_devices, "n_devices", at_least=1)
    asked = {
        "mesh_shape": mesh_shape, "rules": rules, "batch": batch, "pos": pos, "what": what, "dtype": dtype,
        "names_filter": names_filter, "stop_at_layer": stop_at_layer, "remat": remat, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    cfg, device = read_shape(model), jax.devices()[0]
    if dtype is None and not isinstance(model, HookedTransformerConfig | Mapping):
        asked["dtype"] = "float32"
    target = Target(device, device.platform if platform is None else platform)
    if memory is not None:
        memory = checks.whole(memory, "memory", at_least=1)
    elif target.platform == device.platform:
        memory = free_bytes(device)
    found = _planned(cfg, asked, memory, target)
    if found.fits is not False:
        return found
    return dataclasses.replace(found, changes=_helpful(cfg, asked, found, target))


def _helpful(
    cfg: HookedTransformerConfig, asked: dict[str, Any], found: MemoryPlan, target: Target
) -> tuple[Change, ...]:
    """Returns the changes that make a run smaller, those that fit first; several at once where none fits alone."""
    changes, together = list[Change](), dict[str, Any]()
    for options, words in _changes(cfg, asked, found):
        smaller = _tried(cfg, asked | options, found.memory, target)
        if smaller is not None and smaller.bytes < found.bytes:
            changes.append(Change(options, words, smaller.bytes, bool(smaller.fits)))
    if not any(change.fits for change in changes):
        for change in list(changes):
            together |= change.options
            smaller = _tried(cfg, asked | together, found.memory, target)
            if smaller is not None and smaller.fits:
                words = ", ".join(f"{name}={value!r}" for name, value in together.items())
                changes.append(Change(together, words, smaller.bytes, True))
                break
    return tuple(sorted(changes, key=lambda one: (not one.fits, one.bytes)))


def _planned(cfg: HookedTransformerConfig, asked: Mapping[str, Any], memory: int | None, target: Target) -> MemoryPlan:
    """Returns the plan of what was asked, without changes."""
    if asked["dtype"] is not None:
        cfg = cfg.replace(dtype=canonical_dtype(asked["dtype"]))
    what, batch = asked["what"], checks.whole(asked["batch"], "batch", at_least=1)
    spread, own_batch = split(cfg, asked["mesh_shape"], batch, asked["rules"])
    local = spread.local(cfg)
    pos = _length(cfg, asked)
    names, stop = _points(local, asked)
    run = Run(
        cfg=local, batch=own_batch, pos=pos, names=names, stop=stop, remat=asked["remat"],
        max_new_tokens=asked["max_new_tokens"], memory=_ASSUMED if memory is None else memory, target=target,
    )  # fmt: skip
    run = dataclasses.replace(run, target=_compiled_on(run))
    gathered = spread.gathered_bytes(cfg)
    moments = [dataclasses.replace(one, temporaries=one.temporaries + gathered) for one in MOMENTS[what](run)]
    return MemoryPlan(
        cfg.model_name, what, spread.n_devices, cfg.dtype, batch, pos, spread.parameter_bytes(cfg),
        tuple(moments), memory, spread.whole,
    )  # fmt: skip


def _compiled_on(run: Run) -> Target:
    """Returns the target with a device to compile on.

    Compilers of accelerators try programs out on arrays of their own, so large ones are asked of the CPU's.
    """
    device, block = run.target.device, run.cfg.n_params // run.cfg.n_layers * run.cfg.jnp_dtype.itemsize
    if device.platform == "cpu":
        return run.target
    free = free_bytes(device)
    at_hand = run.target.platform == device.platform and free is not None
    if at_hand and not is_large(block + run.logits_bytes + 4 * run.stream_bytes, free or 0):
        return run.target
    return dataclasses.replace(run.target, device=jax.devices("cpu")[0])


def _length(cfg: HookedTransformerConfig, asked: Mapping[str, Any]) -> int:
    """Returns the tokens of a prompt.

    Raises:
        InputError: they are more than the model takes, with the new ones.
    """
    new = checks.whole(asked["max_new_tokens"], "max_new_tokens", at_least=1) if asked["what"] == "generate" else 0
    if asked["pos"] is None:
        return max(1, min(cfg.n_ctx, _LONGEST) - new)
    pos = checks.whole(asked["pos"], "pos", at_least=1)
    if pos + new > cfg.n_ctx:
        together = f" and {new} new ones" if new else ""
        raise InputError(
            f"pos={pos} tokens{together} are more than the {cfg.n_ctx} that {cfg.model_name} takes (n_ctx): at most "
            f"pos={cfg.n_ctx - new}."
        )
    return pos


def _points(cfg: HookedTransformerConfig, asked: Mapping[str, Any]) -> tuple[tuple[str, ...], int | None]:
    """Returns the points that a run keeps, and the block to stop before.

    Raises:
        InputError: an argument does not go with this kind of run.
        UnknownHookError: a name or filter matches nothing.
    """
    what, given, stop = asked["what"], asked["names_filter"], asked["stop_at_layer"]
    if stop is not None and what not in ("forward", "cache"):
        raise InputError(
            f'stop_at_layer= goes with what="forward" and what="cache", not with {what!r}. A harvest ends with the '
            "last point of names_filter=."
        )
    if asked["remat"] and what != "gradients":
        raise InputError(f'remat=True goes with what="gradients", not with {what!r}: nothing else runs backward.')
    if given is not None and what in ("forward", "generate"):
        raise InputError(f'names_filter= goes with runs that keep or patch points; {what!r} keeps none: what="cache".')
    _, last = layer_bounds(cfg, None, stop)
    if what in ("forward", "generate"):
        return (), last
    if given is None and what in ("sweep", "harvest"):
        given = [("resid_post", layer) for layer in range(cfg.n_layers)]
    return reached_names(given, cfg, None, last), last


def _changes(
    cfg: HookedTransformerConfig, asked: Mapping[str, Any], found: MemoryPlan
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields changes that may help: options, and the same in words."""
    what = asked["what"]
    if canonical_dtype(found.dtype) in ("float32", "float64"):
        yield {"dtype": "bfloat16"}, "dtype='bfloat16'"
    if what == "gradients" and not asked["remat"]:
        yield {"remat": True}, "remat=True"
    if what in ("cache", "gradients", "harvest", "sweep"):
        layer = cfg.n_layers // 2
        yield {"names_filter": ("resid_post", layer)}, f"names_filter=('resid_post', {layer}), one point"
        if what == "cache" and asked["stop_at_layer"] is None:
            options = {"names_filter": ("resid_post", layer), "stop_at_layer": layer + 1}
            yield options, f"the same with stop_at_layer={layer + 1}"
    if what == "forward" and asked["stop_at_layer"] is None:
        yield {"stop_at_layer": cfg.n_layers}, f"stop_at_layer={cfg.n_layers}, no logits"
    if found.batch > 1:
        yield {"batch": found.batch // 2}, f"batch={found.batch // 2}"
    if found.pos > 1:
        yield {"pos": found.pos // 2}, f"pos={found.pos // 2}"
    yield from _meshes(cfg, asked, found)


def _meshes(
    cfg: HookedTransformerConfig, asked: Mapping[str, Any], found: MemoryPlan
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the next larger mesh, and the smallest on which the parameters take two thirds of the memory or less."""
    if asked["rules"] is not None:
        return  # only its author knows what another mesh would need
    given = split(cfg, asked["mesh_shape"], found.batch)[0].mesh
    over = given.get(MODEL, 1)
    sizes = [over * 2**power for power in range(1, 11) if cfg.n_heads % (over * 2**power) == 0]
    wide = cfg if asked["dtype"] is None else cfg.replace(dtype=canonical_dtype(asked["dtype"]))
    meshes = [{**given, MODEL: size} for size in sizes]
    enough = [
        mesh for mesh in meshes
        if split(cfg, mesh, found.batch)[0].parameter_bytes(wide) <= (found.memory or 0) * 2 / 3
    ]  # fmt: skip
    for mesh in {tuple(one.items()): one for one in (*meshes[:1], *enough[:1])}.values():
        yield {"mesh_shape": mesh}, f"mesh_shape={mesh}"


def _tried(
    cfg: HookedTransformerConfig, asked: Mapping[str, Any], memory: int | None, target: Target
) -> MemoryPlan | None:
    """Returns the plan of a change, or ``None`` where it does not go with the rest."""
    try:
        return _planned(cfg, asked, memory, target)
    except (InputError, ConfigError):
        return None
