"""What compiled programs take beside their arguments: asked of the compiler, from shapes alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checkpoints.layout import parameter_shapes, unflatten
from tljax.config import HookedTransformerConfig
from tljax.forward.forward import run_forward
from tljax.hooks.dictionary import HookDictionary, HookEntry
from tljax.hooks.interventions import Add
from tljax.modules.context import AttentionContext
from tljax.modules.parameters import stored_dtype
from tljax.numerics import widened
from tljax.typing import Params


def size_of(tree: Any) -> int:
    """Returns the bytes of all arrays, or shapes of arrays, in a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=16)
def abstract_params(cfg: HookedTransformerConfig) -> Params:
    """Returns the parameters of a config as shapes and dtypes."""
    shapes = parameter_shapes(cfg).items()
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(shape, stored_dtype(path.rpartition(".")[2], cfg.jnp_dtype))
            for path, shape in shapes
        }
    )


def stream(cfg: HookedTransformerConfig, batch: int, pos: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of a residual stream."""
    return jax.ShapeDtypeStruct((batch, pos, cfg.d_model), cfg.jnp_dtype)


def read_keys_bytes(cfg: HookedTransformerConfig, batch: int, pos: int) -> int:
    """Returns the bytes of every layer's keys and values of some prompts, as a run records them."""
    return cfg.n_layers * batch * pos * cfg.kv_heads * (cfg.d_head + cfg.value_width) * cfg.jnp_dtype.itemsize


def temporaries(function: Callable[..., Any], *args: Any, device: Any, **options: Any) -> int:
    """Returns the bytes that a function's program takes besides arguments and results.

    Args:
        function: the function, or an already jitted one.
        *args: arrays or shapes.
        device: the device to compile for.
        **options: of :func:`jax.jit`.
    """
    with jax.default_device(device):
        lower: Any = getattr(function, "lower", None) or jax.jit(function, **options).lower
        analysis = lower(*args).compile().memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a plan is for.

    Attributes:
        device: the device that programs are compiled for, to ask what they take.
        platform: the platform of the device that will run them, ``"cpu"`` or another.
    """

    device: Any
    platform: str

    def widened(self, cfg: HookedTransformerConfig) -> HookedTransformerConfig:
        """Returns the config to compile.

        A CPU computes in float32 what is stored in fewer bits, and makes float32 copies of weights for it. A program of
        another device is asked for as float32, whose temporary arrays are at least as large and need no such copies.
        """
        narrow = cfg.jnp_dtype.itemsize < 4 and self.platform != "cpu" and self.device.platform == "cpu"
        return cfg.replace(dtype="float32") if narrow else cfg


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run that is one program.

    Attributes:
        cfg: the config of what a device computes.
        start, stop: the blocks; ``None`` and 0 for the embedding, ``n_layers`` and ``None`` for the unembedding.
        names: full names of the points it records.
        batch, pos: the shape of the prompts.
    """

    cfg: HookedTransformerConfig
    start: int | None
    stop: int | None
    names: tuple[str, ...]
    batch: int
    pos: int

    @property
    def input(self) -> jax.ShapeDtypeStruct:
        """The shape that goes in."""
        if self.start is None:
            return jax.ShapeDtypeStruct((self.batch, self.pos), jnp.int32)
        return stream(self.cfg, self.batch, self.pos)

    def run(self, params: Params, value: Any, hooks: HookDictionary, remat: bool = False) -> tuple[Any, dict[str, Any]]:
        """Runs the stage; traced alone."""
        return run_forward(
            self.cfg, params, value, AttentionContext(), hooks=hooks, names=self.names, start=self.start,
            stop=self.stop, remat=remat,
        )  # fmt: skip


@functools.lru_cache(maxsize=512)
def stage_temporaries(stage: Stage, target: Target) -> int:
    """Returns the temporary bytes of a stage of a forward pass."""
    stage = dataclasses.replace(stage, cfg=target.widened(stage.cfg))

    def forward(params: Params, value: Any) -> Any:
        return stage.run(params, value, HookDictionary())

    return temporaries(forward, abstract_params(stage.cfg), stage.input, device=target.device)


@dataclasses.dataclass(frozen=True)
class Differentiated:
    """A stage of a run that is differentiated, in bytes.

    Attributes:
        held: what it keeps for the backward pass, besides parameters and its input.
        forward, backward: temporary bytes of each pass.
    """

    held: int
    forward: int
    backward: int


@functools.lru_cache(maxsize=256)
def differentiated(stage: Stage, from_input: bool, remat: bool, target: Target) -> Differentiated:
    """Returns what a stage takes in a run that is differentiated at the points it records.

    Args:
        stage: the stage.
        from_input: whether the run is differentiated with respect to the stage's input too, as it is where an earlier
            stage has a point.
        remat: whether the backward pass recomputes the stage.
        target: the device.
    """
    forward, given = _with_backward(stage, from_input, remat)
    jaxpr = jax.make_jaxpr(forward)(*given).jaxpr
    output, pull, _ = jax.eval_shape(forward, *given)
    first, count = len(jax.tree.leaves(output)), len(jax.tree.leaves(pull))
    inputs = {id(var) for var in jaxpr.invars}
    kept = {id(var): var.aval for var in jaxpr.outvars[first : first + count] if id(var) not in inputs}
    held = sum(size_of(jax.ShapeDtypeStruct(aval.shape, aval.dtype)) for aval in kept.values())  # type: ignore[attr-defined]
    forward, given = _with_backward(dataclasses.replace(stage, cfg=target.widened(stage.cfg)), from_input, remat)
    output, pull, _ = jax.eval_shape(forward, *given)
    return Differentiated(
        held,
        temporaries(forward, *given, device=target.device),
        temporaries(lambda pull, slope: pull(slope), pull, output, device=target.device),
    )


def _with_backward(stage: Stage, from_input: bool, remat: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a function that runs a stage and returns its pull-back as well, and the shapes of its arguments."""
    params, value = abstract_params(stage.cfg), stage.input
    recorded = jax.eval_shape(lambda p, v: stage.run(p, v, HookDictionary())[1], params, value)
    offsets = {
        name: jax.ShapeDtypeStruct(one.shape, widened(np.dtype(one.dtype)))
        for name, one in recorded.items()
        if jnp.issubdtype(one.dtype, jnp.floating)
    }

    def forward(params: Params, value: Any, offsets: dict[str, Any]) -> Any:
        def moved(value: Any, offsets: dict[str, Any]) -> Any:
            hooks = HookDictionary(tuple(HookEntry(name, Add(offset)) for name, offset in offsets.items()))
            return stage.run(params, value, hooks, remat)

        if not from_input:
            return jax.vjp(lambda offsets: moved(value, offsets), offsets, has_aux=True)
        return jax.vjp(moved, value, offsets, has_aux=True)

    return forward, (params, value, offsets)
