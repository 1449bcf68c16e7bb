"""Which part of a model a device of a mesh holds, by the rules of :mod:`tljax.scale`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tljax import checks
from tljax.checkpoints.layout import parameter_axes
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.modules.parameters import axis_sizes, stored_dtype
from tljax.scale import ShardingRules, lay_out
from tljax.scale.rules import DATA_AXES, POS_AXIS

DATA, MODEL = "data", "model"


@dataclasses.dataclass(frozen=True)
class Split:
    """How a model and its runs are spread over a mesh.

    Attributes:
        mesh: size of each axis of the mesh.
        rules: what is split over what.
        whole: axes that a rule names, and that the mesh does not divide.
        parts: into how many parts each axis of the model is cut where it computes. An axis that is split over the mesh
            axes of prompts (fully sharded) is gathered for that, and is not among them.
    """

    mesh: Mapping[str, int]
    rules: ShardingRules
    whole: tuple[str, ...]
    parts: Mapping[str, int]

    @property
    def n_devices(self) -> int:
        return math.prod(self.mesh.values())

    def parameter_bytes(self, cfg: HookedTransformerConfig) -> int:
        """Returns the bytes of the parameters that one device holds."""
        return sum(self._sizes(cfg, self.rules).values())

    def gathered_bytes(self, cfg: HookedTransformerConfig) -> int:
        """Returns the most bytes of the copies that a stage works with.

        They are made of parameters that are split over the mesh axes of prompts, while the stage runs.
        """
        kept = {axis: tuple(name for name in over if name not in DATA_AXES) for axis, over in self.rules.rules}
        held, used, copies = self._sizes(cfg, self.rules), self._sizes(cfg, ShardingRules(kept)), dict[str, int]()
        for path, size in used.items():
            stage = ".".join(path.split(".")[: 2 if path.startswith("blocks.") else 1])
            copies[stage] = copies.get(stage, 0) + (size if size > held[path] else 0)
        return max(copies.values())

    def _sizes(self, cfg: HookedTransformerConfig, rules: ShardingRules) -> dict[str, int]:
        """Returns the bytes of each parameter that one device holds by some rules."""
        sizes = axis_sizes(cfg)
        return {
            path: lay_out(
                axes,
                [sizes[axis] for axis in axes],
                rules,
                self.mesh,
                stored_dtype(path.rpartition(".")[2], cfg.jnp_dtype),
            ).bytes_per_device
            for path, axes in parameter_axes(cfg).items()
        }

    def local(self, cfg: HookedTransformerConfig) -> HookedTransformerConfig:
        """Returns the config of what one device computes: its heads, neurons, experts and part of the vocabulary."""
        parts = self.parts
        changes: dict[str, Any] = {
            "n_heads": cfg.n_heads // parts.get("n_heads", 1), "d_head": cfg.d_head, "d_value": cfg.value_width,
            "d_vocab": cfg.d_vocab // parts.get("d_vocab", 1),
            "d_vocab_out": cfg.d_vocab_out // parts.get("d_vocab_out", 1),
        }  # fmt: skip
        if cfg.n_key_value_heads is not None:
            held = cfg.kv_heads // parts.get("n_kv", 1)
            changes["n_key_value_heads"] = math.gcd(held, changes["n_heads"])  # those that its own heads read
        for field, axis in (("d_mlp", "d_mlp"), ("d_shared_expert", "d_shared")):
            if (size := getattr(cfg, field)) is not None:
                changes[field] = size // parts.get(axis, 1)
        if cfg.num_experts is not None and (cut := parts.get("n_experts", 1)) > 1:
            here = cfg.num_experts // cut
            # Each token goes to experts_per_token experts of all: on average this many of those here.
            per_token = max(1, -(-(cfg.experts_per_token or 1) // cut))
            changes |= {"num_experts": here, "experts_per_token": min(here, per_token), "expert_groups": None}
            changes |= {"expert_groups_per_token": None}
        return cfg.replace(**changes)


def split(
    cfg: HookedTransformerConfig, mesh_shape: Any, batch: int, rules: ShardingRules | Mapping[str, Any] | None = None
) -> tuple[Split, int]:
    """Spreads a model over a mesh.

    Args:
        cfg: the config.
        mesh_shape: ``None`` for one device; a number of devices that share the model; ``(data, model)``; or sizes by
            the names of the axes.
        batch: how many prompts run at once.
        rules: what is split over what; ``None`` means what the names of the mesh's axes suggest.

    Returns:
        The split, and how many of the prompts a device runs.

    Raises:
        InputError: the mesh has another form, or divides nothing.
        ShardingError: rules and mesh do not fit each other.
    """
    mesh = _read(mesh_shape)
    chosen = ShardingRules.for_mesh(mesh) if rules is None else ShardingRules(rules)
    chosen.check(mesh)
    over_data = [name for name in DATA_AXES if name in mesh]
    groups = math.prod(mesh[name] for name in over_data)
    if batch % groups:
        fitting = -(-batch // groups) * groups
        named = " and ".join(map(repr, over_data))
        raise InputError(
            f"batch={batch} prompts cannot be spread over {groups} devices of the mesh's {named}: take "
            f"batch={fitting}, or fewer devices there."
        )
    whole, parts = _cut(cfg, mesh, chosen)
    return Split(mesh, chosen, whole, parts), batch // groups


def _cut(
    cfg: HookedTransformerConfig, mesh: Mapping[str, int], rules: ShardingRules
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns axes that have a rule and are whole all the same, and into how many parts others are cut.

    Raises:
        InputError: nothing is cut by an axis of the mesh that is not for prompts.
    """
    sizes, whole, parts, tried = axis_sizes(cfg), list[str](), dict[str, int](), dict[str, dict[str, int]]()
    for axis, over in rules.rules:
        size = sizes.get(axis, 0)
        for name in over:
            if mesh[name] == 1 or size <= 1:
                continue
            tried.setdefault(name, {})[axis] = size
            done = parts.get(axis, 1)
            if size % (done * mesh[name]):
                whole.append(axis)
            elif name not in DATA_AXES:
                parts[axis] = done * mesh[name]
    for name, axes in tried.items():
        if name not in DATA_AXES and all(axis in whole for axis in axes):
            held = ", ".join(f"{axis}={size}" for axis, size in axes.items())
            raise InputError(
                f"The mesh's axis {name!r} of {mesh[name]} devices divides no axis of this model ({held}): every "
                f"device would hold all of it. Take a divisor, such as {_largest_divisor(cfg.n_heads, mesh[name])}."
            )
    return tuple(dict.fromkeys(whole)), parts


def _read(mesh_shape: Any) -> dict[str, int]:
    """Returns the size of each axis by its name."""
    if mesh_shape is None:
        given: dict[Any, Any] = {DATA: 1, MODEL: 1}
    elif isinstance(mesh_shape, Mapping):
        given = dict(mesh_shape)
    elif isinstance(mesh_shape, Sequence) and not isinstance(mesh_shape, str) and len(mesh_shape) in (1, 2):
        given = {DATA: 1, MODEL: mesh_shape[-1]} | ({DATA: mesh_shape[0]} if len(mesh_shape) == 2 else {})
    elif isinstance(mesh_shape, int | np.integer):
        given = {DATA: 1, MODEL: mesh_shape}
    else:
        raise InputError(
            f"mesh_shape={mesh_shape!r} must be a number of devices, (data, model), or a dict such as "
            f"{{{DATA!r}: 2, {MODEL!r}: 4}}."
        )
    if unnamed := [name for name in given if not isinstance(name, str)]:
        raise InputError(f"mesh_shape has an axis {unnamed[0]!r}; axes have names, such as {DATA!r} and {MODEL!r}.")
    if given.get(POS_AXIS, 1) != 1:
        raise InputError(
            f"mesh_shape has {POS_AXIS!r}: plans do not count positions that are spread over devices. Leave that axis "
            f"out and plan for pos= of one device's share; its keys and values of all positions come on top."
        )
    return {name: checks.whole(size, f"mesh_shape[{name!r}]", at_least=1) for name, size in given.items()}


def _largest_divisor(size: int, most: int) -> int:
    return max(number for number in range(1, max(most, 1) + 1) if size % number == 0)
