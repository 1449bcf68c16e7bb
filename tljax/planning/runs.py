"""The moments of a run at which its memory may be largest: one function for each kind of run."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.cache.memory import cache_bytes
from tljax.config import HookedTransformerConfig
from tljax.forward.forward import rows_of_run
from tljax.harvest.collecting import collect_rows
from tljax.hooks.dictionary import HookDictionary
from tljax.hooks.points import ENTRY, HEAD, layer_of, point_table, stage_of
from tljax.numerics import widened
from tljax.planning.generating import generation_moments
from tljax.planning.programs import (
    Differentiated,
    Stage,
    Target,
    differentiated,
    size_of,
    stage_temporaries,
    stream,
    temporaries,
)
from tljax.planning.result import Moment
from tljax.planning.sweeping import sweep_moments

What = Literal["forward", "cache", "gradients", "sweep", "generate", "harvest"]
_STORED = "bfloat16"
"""As what a harvest stores activations unless it is told otherwise."""
_WAITING = 3
"""Batches of a harvest that are in a host's memory at once, on their way to the disk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run on one device.

    Attributes:
        cfg: the config of what the device computes.
        batch, pos: the prompts that it runs.
        names: full names of the points that are kept, in firing order.
        stop: the block to stop before; ``None`` for logits.
        remat: whether the backward pass recomputes each block.
        max_new_tokens: tokens to generate.
        memory: bytes that the device has, by which sweeps choose how much to run at once.
        target: the device.
    """

    cfg: HookedTransformerConfig
    batch: int
    pos: int
    names: tuple[str, ...]
    stop: int | None
    remat: bool
    max_new_tokens: int
    memory: int
    target: Target

    @property
    def stream_bytes(self) -> int:
        return size_of(stream(self.cfg, self.batch, self.pos))

    @property
    def logits_bytes(self) -> int:
        return self.batch * self.pos * self.cfg.d_vocab_out * self.cfg.jnp_dtype.itemsize

    def kept_bytes(self, names: Sequence[str]) -> int:
        return cache_bytes(self.cfg, tuple(names), self.batch, self.pos)

    def stages(self, names: Sequence[str], stop: int | None) -> Iterator[tuple[str, Stage, tuple[str, ...]]]:
        """Yields each stage in words, a stage with the same program, and the names of the points it records."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(stage_of(name)[0], []).append(name)
        cfg, shape = self.cfg.computation, (self.batch, self.pos)
        own = tuple(name for name in names if layer_of(name) is None and stage_of(name)[0] != HEAD)
        yield "in the embedding", Stage(cfg, None, 0, own, *shape), own
        kinds = cfg.layer_kinds
        for layer in range(cfg.n_layers if stop is None else stop):
            recorded = tuple(groups.get(f"blocks.{layer}.", ()))
            same = kinds.index(kinds[layer])
            moved = tuple(f"blocks.{same}.{stage_of(name)[1]}" for name in recorded)
            yield f"in block {layer}", Stage(cfg, same, same + 1, moved, *shape), recorded
        if stop is None:
            own = tuple(groups.get(HEAD, ()))
            yield "in the unembedding", Stage(cfg, cfg.n_layers, None, own, *shape), own


def forward_moments(run: Run) -> list[Moment]:
    """Stage by stage: the stream that goes in, what comes out, and what has been recorded so far."""
    moments, recorded = [], 0
    for where, stage, names in run.stages(run.names, run.stop):
        recorded += run.kept_bytes(names)
        flowing = run.stream_bytes * (1 if stage.start is None else 2)
        if stage.start is not None and stage.stop is None:
            flowing = run.stream_bytes + run.logits_bytes
        moments.append(Moment(where, flowing, recorded, stage_temporaries(stage, run.target)))
    return moments


def gradient_moments(run: Run) -> list[Moment]:
    """A metric of the last position: everything that the backward pass needs is held until it ends.

    Stages before the first point are not differentiated, and keep nothing.
    """
    single = dataclasses.replace(run, pos=1)
    offsets = {
        name: (row.shape(run.batch, run.pos), widened(row.dtype))
        for name, row in rows_of_run(run.cfg, run.names, HookDictionary()).items()
    }
    zeros = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in set(offsets.values()))
    gradients = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in offsets.values())
    at_head = any(stage_of(name)[0] == HEAD for name in run.names)
    moments, held, recorded, reached = [], zeros, 0, False
    largest: dict[str, Differentiated] = {}
    for where, stage, names in run.stages(run.names, None):
        of_head = stage.start is not None and stage.stop is None
        seen = stage if at_head or not of_head else dataclasses.replace(stage, pos=1)
        recorded += run.kept_bytes(names)
        out = (run if at_head else single).logits_bytes if of_head else run.stream_bytes
        if not (reached or offsets.keys() & set(names)):
            flowing = zeros + run.stream_bytes + out
            moments.append(Moment(f"{where}, forward", flowing, recorded, stage_temporaries(seen, run.target)))
            continue
        held += 0 if reached or stage.start is None else run.stream_bytes
        found = differentiated(seen, reached, run.remat, run.target)
        reached = True
        held += found.held + out
        moments.append(Moment(f"{where}, forward", held, recorded, found.forward))
        largest[where] = found
    if largest:
        where = max(largest, key=lambda name: largest[name].backward)
        slope = 2 * run.stream_bytes
        moments.append(Moment(f"{where}, backward", held + slope, recorded + gradients, largest[where].backward))
    return moments


def harvest_moments(run: Run) -> list[Moment]:
    """A forward pass that ends with the last point, and the rows made of what it recorded."""
    last, names = run.names[-1], run.names
    stop = layer_of(last)
    if stop is not None and stage_of(last)[1] == ENTRY:
        names = names[:-1]  # what enters a block is what the run returns that stops before it
    elif stop is not None:
        stop += 1
    head = stage_of(last)[0] == HEAD
    ends = None if head else 0 if stop is None else stop
    moments = forward_moments(dataclasses.replace(run, names=names, stop=ends))
    table = point_table(run.cfg)
    values = tuple(jax.ShapeDtypeStruct(table[name].shape(run.batch, run.pos), table[name].dtype) for name in run.names)
    kept = jax.ShapeDtypeStruct((run.batch * run.pos,), jnp.bool_)
    rows = sum(value.size for value in values) * np.dtype(_STORED).itemsize
    made = temporaries(collect_rows, values, kept, _STORED, None, False, device=run.target.device)
    waiting = _WAITING if run.target.platform == "cpu" else 0
    held = run.kept_bytes(run.names)
    moments.append(Moment("collecting rows", 0, held + rows * (1 + waiting), made))
    return [dataclasses.replace(one, cache=one.cache + rows * waiting) for one in moments[:-1]] + moments[-1:]


def moments_of_generation(run: Run) -> list[Moment]:
    """The prompts, then tokens one by one."""
    return generation_moments(run.cfg, run.batch, run.pos, run.max_new_tokens, run.target, run.memory)


def moments_of_sweep(run: Run) -> list[Moment]:
    """The base run and the run that values come from, then pages of patched runs."""
    return sweep_moments(run.cfg, run.batch, run.pos, run.names, run.memory, run.target)


MOMENTS: Mapping[What, Callable[[Run], list[Moment]]] = {
    "forward": forward_moments, "cache": forward_moments, "gradients": gradient_moments, "sweep": moments_of_sweep,
    "generate": moments_of_generation, "harvest": harvest_moments,
}  # fmt: skip
