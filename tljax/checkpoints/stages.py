"""Reading the stages of a checkpoint (a block, the embedding, the head): each read, placed, processed, rounded."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checkpoints.description import Description
from tljax.checkpoints.files.reader import Tensors
from tljax.checkpoints.finite import refuse_overflow
from tljax.checkpoints.formats.quantized.codes import has_codes, read_packed
from tljax.checkpoints.layout import flatten, parameter_axes, parameter_shapes, stages_of, unflatten
from tljax.checkpoints.placement import Placer, host_device, in_parts
from tljax.checkpoints.rows import Entry
from tljax.checkpoints.slices import PartReader, PartTensors, reads_parts
from tljax.config import HookedTransformerConfig
from tljax.errors import CheckpointError
from tljax.hooks.points import layer_of
from tljax.modules.parameters import axis_sizes, stored_dtype
from tljax.offload import HostBlocks
from tljax.quantized_weight import QuantizedWeight, is_quantized
from tljax.typing import Params
from tljax.weights.processing import process_and_reuse
from tljax.weights.quantization import WeightBits, is_quantizable, quantize_parameters
from tljax.weights.steps import Steps


@dataclasses.dataclass(frozen=True)
class StageReader:
    """Reads the stages of a checkpoint.

    Attributes:
        entries: the bound rows of each stage.
        tensors: what is stored.
        stored: describes the files.
        cfg: the config before weight processing.
        steps: the processing.
        origin: what errors of overflow name; it is not checked if this is ``None``.
        held: how large matrices of blocks are rounded; ``None``: not at all.
        keep: whether weights that are stored quantised stay so.
    """

    entries: Mapping[str, list[Entry]]
    tensors: Tensors
    stored: Description
    cfg: HookedTransformerConfig
    steps: Steps
    origin: str | None
    held: WeightBits | None = None
    keep: bool = False

    def read(self, place: Placer, offload: bool) -> Params:
        """Reads the stages one after another; with ``offload`` blocks are left for when they run."""
        params: dict[str, jax.Array] = {}
        for stage, paths in stages_of(self.cfg).items():
            if layer_of(stage) is None or not offload:
                params |= self.stage(stage, paths, place)
                jax.block_until_ready(params)
        nested = unflatten(params)
        return {**nested, "blocks": self._blocks(place)} if offload else nested

    def stage(self, stage: str, paths: list[str], place: Placer) -> dict[str, Any]:
        """Returns the processed, perhaps rounded, parameters of one stage by their paths."""
        prefix, stored = stage if layer_of(stage) is not None else "", self.stored
        processed = flatten(_processed(self._raw(stage, paths, prefix, place), self.steps, self.cfg.dtype))
        placed = {prefix + name: place(prefix + name, processed.pop(name)) for name in list(processed)}
        if self.origin is not None:
            sizes = axis_sizes(stored.cfg)
            keys = {path: entry.keys(sizes) for entry in self.entries[stage] for path in entry.targets}
            floats = {path: leaf for path, leaf in placed.items() if not isinstance(leaf, QuantizedWeight)}
            own = {path: floats[path] for path in floats.keys() - stored.computed}
            refuse_overflow(own, keys, self.tensors, self.origin)
        if self.held is not None:
            rounded = quantize_parameters(placed, parameter_axes(self.cfg), self.held)
            placed = {path: place(path, leaf) for path, leaf in rounded.items()}
        return placed

    def _raw(self, stage: str, paths: list[str], prefix: str, place: Placer) -> Params:
        stored, cfg = self.stored, self.cfg
        sizes, axes, shapes = axis_sizes(stored.cfg), parameter_axes(cfg), parameter_shapes(cfg)
        raw = {}
        for entry in self.entries[stage]:
            if self.keep and _stays_packed(entry, self.tensors, axes, sizes):
                packed = read_packed(entry, self.tensors, axes, sizes, cfg.dtype)
                raw |= {path: place(path, weight) for path, weight in zip(entry.targets, packed, strict=True)}
                continue
            raw |= _read_entry(entry, self.tensors, axes[entry.targets[0]], sizes, shapes, place)
        raw |= {
            path: place(path, stored.computed[path]()[: shapes[path][0]]) for path in paths if path in stored.computed
        }
        raw |= {path: place(path, np.zeros(shapes[path], cfg.dtype)) for path in paths if path not in raw}
        return unflatten({path.removeprefix(prefix): array for path, array in raw.items()})

    def _blocks(self, place: Placer) -> HostBlocks:
        """Returns the blocks, each of which is read when it runs."""
        after, stages = self.steps.config_after(self.cfg), stages_of(self.cfg)
        host, dtype = Placer(host_device()), jnp.dtype(self.cfg.dtype)
        shapes: list[dict[str, Any]] = [{} for _ in range(self.cfg.n_layers)]
        for path, shape in parameter_shapes(after).items():
            if (layer := layer_of(path)) is not None:
                name = path.removeprefix(f"blocks.{layer}.")
                shapes[layer][name] = jax.ShapeDtypeStruct(shape, stored_dtype(name.rpartition(".")[2], dtype))

        def read(layer: int) -> Params:
            stage = f"blocks.{layer}."
            try:
                placed = self.stage(stage, stages[stage], host)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} (Block {layer} stays in the checkpoint and is read whenever it runs, offload='host': its "
                    "files must stay as they were. Put them back, or load the model again.)"
                ) from error
            return unflatten({path.removeprefix(stage): np.asarray(array) for path, array in placed.items()})

        return HostBlocks(read, [unflatten(block) for block in shapes], place.target("", ()), n_sampled=1)


def _read_entry(
    entry: Entry,
    tensors: Tensors,
    axes: Sequence[str],
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    place: Placer,
) -> dict[str, jax.Array]:
    """Reads the parameters of one entry; of a mesh's devices each gets its own part of the file, where it holds parts.

    Tensors that are computed as they are read (an adapter merged, four-bit numbers unpacked), pickles, and tensors in
    memory are read whole. ``shapes`` are the parameters', which may lack the last positions of the stored ones.
    """
    targets = {path: place.target(path, shapes[path]) for path in entry.targets}
    spread = all(isinstance(one, jax.sharding.Sharding) and len(one.device_set) > 1 for one in targets.values())
    if spread and reads_parts(tensors, entry.keys(sizes)):
        reader = PartReader(entry, cast(PartTensors, tensors), axes, sizes)
        return {
            path: in_parts(shapes[path], target, functools.partial(reader.read, part))
            for part, (path, target) in enumerate(targets.items())
        }
    parts = entry.read(tensors.read, axes, sizes)
    return {
        path: place(path, part[: shapes[path][0]] if part.ndim else part)
        for path, part in zip(entry.targets, parts, strict=True)
    }


def _stays_packed(
    entry: Entry, tensors: Tensors, axes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]
) -> bool:
    """Whether an entry's parameters are large matrices of a block that are stored quantised."""
    large = all(is_quantizable(path, axes[path]) for path in entry.targets)
    return large and has_codes(tensors, entry.keys(sizes))


def _processed(stage: Params, steps: Steps, dtype: str) -> Params:
    """Returns a processed stage, in the stage's own memory; the stage itself where nothing changes."""
    flat = flatten(stage)
    wanted = {path: stored_dtype(path.rpartition(".")[2], jnp.dtype(dtype)) for path in flat}
    if is_quantized(stage):  # no steps then
        return unflatten({path: leaf.astype(wanted[path]) for path, leaf in flat.items()})
    changes = steps or any(leaf.dtype != wanted[path] for path, leaf in flat.items())
    return process_and_reuse(stage, steps, dtype) if changes else stage
