"""Caches on disk: one safetensors file, whose header records the model that made the cache."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tljax.config import HookedTransformerConfig
from tljax.errors import CacheError
from tljax.fingerprint import FORM, Fingerprint
from tljax.hooks.points import point_table
from tljax.safetensors_files import own_errors, read_own, write_own

_FORMAT = "tljax-activation-cache-1"
_PADDING = ("padding.token", "padding.key")
"""Names of the tensors that mark padding, if there is any; readers that do not know them skip them."""
_FIELDS = {"cfg": dict, "has_batch_dim": bool, "order": [str], "weights?": FORM["weights"]}
_REMEDY = "Save the cache again."

Padding = tuple[jax.Array | None, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A cache as its file holds it.

    Attributes:
        activations: by name, in order.
        origin: identifies the model that made them; older files lack the sample of its weights.
        has_batch_dim: whether the activations have their batch axis.
        padding: the padding marks for tokens and for keys, each ``None`` if there is no padding.
    """

    activations: dict[str, jax.Array]
    origin: Fingerprint
    has_batch_dim: bool
    padding: Padding


def save(
    path: Path,
    activations: dict[str, jax.Array],
    origin: Fingerprint,
    has_batch_dim: bool,
    padding: Padding = (None, None),
) -> None:
    """Writes activations, their order, the model that made them and the marks of padding."""
    marks = {name: value for name, value in zip(_PADDING, padding, strict=True) if value is not None}
    made_by = origin.to_dict()
    write_own(
        path, _FORMAT, activations | marks,
        cfg=made_by["config"], weights=made_by["weights"], has_batch_dim=has_batch_dim, order=list(activations),
    )  # fmt: skip


def load(path: Path) -> Stored:
    """Reads what :func:`save` wrote.

    Raises:
        CacheError: no such file, a damaged one, or one that is not a cache.
    """
    arrays, header = read_own(
        path, _FORMAT, "a cache that ActivationCache.save wrote", _REMEDY, CacheError, fields=_FIELDS
    )
    with own_errors(path, _REMEDY, CacheError):
        marks = {name: arrays.pop(name, None) for name in _PADDING}
        if sorted(header["order"]) != sorted(arrays):
            raise ValueError("it does not hold the activations that its header lists")
        origin = Fingerprint.from_dict({"config": header["cfg"], "weights": header.get("weights")})
        if "weights" not in header:  # written before there were checksums
            _check_shapes(arrays, origin.cfg)
        _check_marks(marks)
    return Stored(
        {name: arrays[name] for name in header["order"]}, origin, header["has_batch_dim"],
        (marks[_PADDING[0]], marks[_PADDING[1]]),
    )  # fmt: skip


def _check_shapes(arrays: dict[str, jax.Array], cfg: HookedTransformerConfig) -> None:
    """Refuses activations whose shape or dtype the model cannot produce at that hook point."""
    table = point_table(cfg)
    for name, value in arrays.items():
        spec = table.get(name.removesuffix("_grad"))
        sizes = {} if spec is None else dict(spec.sizes)
        fixed = [sizes.get(axis) for axis in (spec.axes if spec is not None else ())]
        while fixed and fixed[0] is None:
            fixed.pop(0)
        wrong = [size for size, found in zip(fixed[::-1], value.shape[::-1], strict=False) if size not in (None, found)]
        if wrong or value.ndim < len(fixed):
            raise ValueError(f"{name} cannot have the shape {value.shape}")
        numbers = spec is None or spec.holds_numbers
        if not numbers and not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{name} cannot be {value.dtype}")


def _check_marks(marks: dict[str, Any]) -> None:
    """Refuses padding marks that are not float32 offsets with one or two axes."""
    for name, value in marks.items():
        if value is not None and (value.dtype != "float32" or value.ndim not in (1, 2)):
            raise ValueError(f"{name} cannot be {value.dtype}{list(value.shape)}")
