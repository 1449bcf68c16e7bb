"""Blocks whose parameters stay on the host and go to the device one after another, as they run.

``params["blocks"]`` of an offloaded model is a :class:`HostBlocks` instead of a tuple. Whatever reads one block,
``params["blocks"][layer]``, gets its parameters on the device. A driver that runs several goes through :class:`Walk`,
which places the next block while this one runs.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.core import Tracer

from tljax.errors import OffloadError
from tljax.typing import Params

Read = Callable[[int], Params]
"""Returns the parameters of a block as numpy arrays."""

_NOT_AT_ONCE = (
    "The blocks of this model stay on the host (offload='host') and go to the device one at a time; this needs all of "
    "them at once, as jax.jit, jax.grad, jax.vmap and jax.tree.map over a model do. Call the model's own methods "
    "(model(...), run_with_cache, run_with_hooks, run_with_grads, generate), sweep or harvest, outside jax.jit; move "
    "it with model.to(device); or bring all blocks to the device: model = model.offload(None)."
)
_IN_JIT = (
    "The blocks of this model stay on the host (offload='host') and go to the device one at a time, which one program "
    "of your own jax.jit (or jax.lax loop) around the model cannot do. Leave that jit out: every block is compiled as "
    "it is. Or bring all blocks to the device first: model = model.offload(None)."
)


class HostBlocks(Sequence[Params]):
    """The parameters of all blocks, on the host; one that is taken out is on the device.

    No pytree of arrays: taking it apart, as ``jax.jit`` does with its arguments, is an error that says what to do.

    Args:
        read: returns the parameters of a block as numpy arrays.
        shapes: of each block, the same tree of ``jax.ShapeDtypeStruct``.
        device: where blocks run; ``None`` is jax's default.
        n_sampled: how many blocks, from the first, are read to tell the model from others (:mod:`tljax.fingerprint`).
        beside: by layer, what belongs to a block and lies on the device all the time: spliced dictionaries.

    Attributes:
        known: what is remembered of the blocks' numbers, for as long as they and their copies live.
    """

    def __init__(
        self,
        read: Read,
        shapes: Sequence[Params],
        device: Any,
        n_sampled: int,
        beside: Mapping[int, Params] | None = None,
    ) -> None:
        self.read, self.shapes, self.device, self.n_sampled = read, tuple(shapes), device, n_sampled
        self.beside, self.known = dict(beside or {}), dict[str, Any]()

    @classmethod
    def holding(cls, blocks: Sequence[Params], device: Any) -> "HostBlocks":
        """Returns blocks that are held in the host's memory, copied there if they lie elsewhere."""
        held = tuple(jax.tree.map(np.asarray, block) for block in blocks)
        shapes = [jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), block) for block in held]
        return cls(held.__getitem__, shapes, device, len(held))

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, layer: Any) -> Any:
        """Returns the parameters of a block on the device; of a slice, one after another as they are asked for."""
        if isinstance(layer, slice):
            return map(self.place, range(len(self))[layer])
        return self.place(range(len(self))[layer])

    def __iter__(self) -> Iterator[Params]:
        return map(self.place, range(len(self)))

    def place(self, layer: int, alone: bool = False) -> Params:
        """Returns the parameters of a block on the device.

        Args:
            layer: the block.
            alone: whether to leave out what lies beside them.

        Raises:
            OffloadError: this is traced by ``jax.jit``, which would make the parameters constants of its program.
        """
        if is_in_jit():
            raise OffloadError(_IN_JIT)
        placed = jax.device_put(self.read(layer), self.device)
        return placed if alone else {**placed, **self.beside.get(layer, {})}

    def on(self, device: Any) -> "HostBlocks":
        """Returns the blocks for another device."""
        return self._with(device, jax.device_put(self.beside, device))

    def with_beside(self, beside: Mapping[int, Params]) -> "HostBlocks":
        """Returns the blocks with other things beside them."""
        return self._with(self.device, beside)

    def _with(self, device: Any, beside: Mapping[int, Params]) -> "HostBlocks":
        changed = HostBlocks(self.read, self.shapes, device, self.n_sampled, beside)
        changed.known = self.known
        return changed

    def __reduce__(self) -> NoReturn:
        raise OffloadError(
            "A model whose blocks stay on the host is neither copied nor pickled: they may be in a checkpoint's files. "
            "Pickle model.offload(None), or load it again."
        )


def _refuse(blocks: HostBlocks) -> NoReturn:
    raise OffloadError(_NOT_AT_ONCE)


jax.tree_util.register_pytree_node(HostBlocks, _refuse, lambda _, children: _refuse(children))


@dataclasses.dataclass(frozen=True)
class HostBlock:
    """One block that is placed when its program runs: a backward pass places it again, instead of keeping it."""

    blocks: HostBlocks
    layer: int

    @property
    def beside(self) -> Params:
        """What lies on the device beside the block's parameters."""
        return self.blocks.beside.get(self.layer, {})


class Deferred:
    """Blocks on the host whose programs place them themselves (:class:`HostBlock`), in the place of a :class:`Walk`."""

    def __init__(self, blocks: HostBlocks) -> None:
        self._blocks = blocks

    def take(self, layer: int) -> HostBlock:
        """Returns a block, not placed yet."""
        return HostBlock(self._blocks, layer)

    def ahead(self, entered: Any) -> None:
        """Does nothing."""


class Walk:
    """The parameters of some blocks, in the order in which they run.

    Of blocks on the host the next is placed while this one runs, so that no more than two lie on the device.

    Args:
        blocks: parameters of all blocks.
        layers: those that will be taken, in order; no other is read.
    """

    def __init__(self, blocks: Sequence[Params], layers: Sequence[int]) -> None:
        self._blocks = blocks
        self._coming = collections.deque(layers if isinstance(blocks, HostBlocks) else ())
        self._placed: Params | None = None

    def take(self, layer: int) -> Params:
        """Returns the parameters of the next block."""
        if not isinstance(self._blocks, HostBlocks):
            return self._blocks[layer]
        self._coming.popleft()
        placed, self._placed = self._placed, None
        return self._blocks.place(layer) if placed is None else placed

    def ahead(self, entered: Any) -> None:
        """Starts to place the next block; to be called when the program of this one has been started.

        Args:
            entered: what this block was given. Once it is there, the block before has run, and its parameters are free.
        """
        if self._coming and isinstance(self._blocks, HostBlocks):
            jax.block_until_ready(entered)
            self._placed = self._blocks.place(self._coming[0])


def is_in_jit() -> bool:
    """Whether this runs while a program of a caller's is traced, which ``jax.grad`` and ``jax.vmap`` alone are not."""
    return isinstance(jax.device_put(np.int8(0)), Tracer)


def is_offloaded(params: Params) -> bool:
    """Whether blocks stay on the host."""
    return isinstance(params.get("blocks"), HostBlocks)


def abstract(params: Params) -> Params:
    """Returns parameters with the blocks on the host as ``jax.ShapeDtypeStruct``, and the rest as it is."""
    blocks = params.get("blocks") if isinstance(params, Mapping) else None
    if not isinstance(blocks, HostBlocks):
        return params
    whole = tuple({**block, **blocks.beside.get(layer, {})} for layer, block in enumerate(blocks.shapes))
    return {**params, "blocks": whole}


def on_host(params: Params) -> Params:
    """Returns parameters with the blocks on the host as numpy arrays, read whole, and the rest as it is."""
    blocks = params.get("blocks")
    if not isinstance(blocks, HostBlocks):
        return params
    return {**params, "blocks": tuple(blocks.read(layer) for layer in range(len(blocks)))}


def resident(params: Params) -> Params:
    """Returns what lies on the device of parameters at any time: all of them, or those beside blocks on the host."""
    blocks = params.get("blocks")
    return {**params, "blocks": blocks.beside} if isinstance(blocks, HostBlocks) else params
