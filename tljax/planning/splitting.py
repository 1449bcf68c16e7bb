"""Which part of a model a device of a mesh holds, by the rules of :mod:`tljax.scale`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tljax import checks
from tljax.checkpoints.layout import parameter_axes
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, nearest
from tljax.modules.parameters import axis_sizes, stored_dtype
from tljax.scale import ShardingRules, lay_out

DATA, MODEL = "data", "model"
RULES = ShardingRules.for_mesh((DATA, MODEL))
"""What a plan splits over the axes of its mesh: the rules that loading and :meth:`HookedTransformer.shard` take."""


@dataclasses.dataclass(frozen=True)
class Split:
    """How a model and its runs are spread over a mesh.

    Attributes:
        mesh: size of each axis of the mesh.
        whole: axes that a rule names, and that the mesh does not divide.
        parts: into how many parts each axis of the model is cut.
    """

    mesh: Mapping[str, int]
    whole: tuple[str, ...]
    parts: Mapping[str, int]

    @property
    def n_devices(self) -> int:
        return math.prod(self.mesh.values())

    def parameter_bytes(self, cfg: HookedTransformerConfig) -> int:
        """Returns the bytes of the parameters that one device holds."""
        sizes = axis_sizes(cfg)
        return sum(
            lay_out(
                axes,
                [sizes[axis] for axis in axes],
                RULES,
                self.mesh,
                stored_dtype(path.rpartition(".")[2], cfg.jnp_dtype),
            ).bytes_per_device
            for path, axes in parameter_axes(cfg).items()
        )

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


def split(cfg: HookedTransformerConfig, mesh_shape: Any, batch: int) -> tuple[Split, int]:
    """Spreads a model over a mesh.

    Args:
        cfg: the config.
        mesh_shape: ``None`` for one device; a number of devices that share the model; ``(data, model)``; or sizes by
            the names ``"data"`` and ``"model"``.
        batch: how many prompts run at once.

    Returns:
        The split, and how many of the prompts a device runs.

    Raises:
        InputError: the mesh has another form or other names, or divides nothing.
    """
    mesh = _read(mesh_shape)
    if batch % mesh[DATA]:
        fitting = -(-batch // mesh[DATA]) * mesh[DATA]
        raise InputError(
            f"batch={batch} prompts cannot be spread over {mesh[DATA]} devices of the mesh's axis {DATA!r}: take "
            f"batch={fitting}, or fewer devices there."
        )
    sizes = axis_sizes(cfg)
    cut = [axis for axis, over in RULES.rules if MODEL in over and sizes.get(axis, 1) > 1 and mesh[MODEL] > 1]
    whole = tuple(axis for axis in cut if sizes[axis] % mesh[MODEL])
    if cut and len(whole) == len(cut):
        held = ", ".join(f"{axis}={sizes[axis]}" for axis in cut)
        raise InputError(
            f"The mesh's axis {MODEL!r} of {mesh[MODEL]} devices divides no axis of this model ({held}): every device "
            f"would hold all of it. Take a divisor, such as {_largest_divisor(cfg.n_heads, mesh[MODEL])}."
        )
    parts = {axis: mesh[MODEL] for axis in cut if axis not in whole}
    return Split(mesh, whole, parts), batch // mesh[DATA]


def _read(mesh_shape: Any) -> dict[str, int]:
    """Returns the sizes of both axes."""
    if mesh_shape is None:
        return {DATA: 1, MODEL: 1}
    if isinstance(mesh_shape, Mapping):
        if unknown := [name for name in mesh_shape if name not in (DATA, MODEL)]:
            raise InputError(
                f"mesh_shape has the axis {unknown[0]!r}; a plan spreads prompts over {DATA!r} and heads, neurons, "
                f"experts and vocabulary over {MODEL!r}.{nearest(str(unknown[0]), (DATA, MODEL))}"
            )
        given = {DATA: 1, MODEL: 1} | dict(mesh_shape)
    elif isinstance(mesh_shape, Sequence) and not isinstance(mesh_shape, str) and len(mesh_shape) in (1, 2):
        given = {DATA: 1, MODEL: mesh_shape[-1]} | ({DATA: mesh_shape[0]} if len(mesh_shape) == 2 else {})
    elif isinstance(mesh_shape, int | np.integer):
        given = {DATA: 1, MODEL: mesh_shape}
    else:
        raise InputError(
            f"mesh_shape={mesh_shape!r} must be a number of devices, (data, model), or a dict such as "
            f"{{{DATA!r}: 2, {MODEL!r}: 4}}."
        )
    return {name: checks.whole(size, f"mesh_shape[{name!r}]", at_least=1) for name, size in given.items()}


def _largest_divisor(size: int, most: int) -> int:
    return max(number for number in range(1, max(most, 1) + 1) if size % number == 0)
