"""The residual stream that a lens was fitted on, and the files that lenses are saved in."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tljax.errors import CheckpointError, InputError
from tljax.fingerprint import FORM, Fingerprint, fingerprint_of
from tljax.model.hooked_transformer import HookedTransformer
from tljax.safetensors_files import own_errors, read_own, write_own

_BASIS = {"model_name": str, "n_layers": int, "d_model": int, "is_centred": bool}
_REMEDY = "Save the lens again."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LensBasis:
    """The residual stream that a lens was fitted on.

    Attributes:
        model_name: the model's name.
        n_layers, d_model: the model's sizes.
        is_centred: whether writing weights were centred, which removes the mean of every vector of the stream.
        origin: the model's fingerprint; ``None`` in files saved before fingerprints existed.
    """

    model_name: str
    n_layers: int
    d_model: int
    is_centred: bool
    origin: Fingerprint | None = None

    @classmethod
    def of(cls, model: HookedTransformer) -> "LensBasis":
        """Returns the basis of a model."""
        cfg = model.cfg
        return cls(
            origin=fingerprint_of(model),
            model_name=cfg.model_name,
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            is_centred="center_writing_weights" in cfg.weight_processing,
        )

    def check(self, model: HookedTransformer) -> None:
        """Checks that a model has this residual stream.

        Raises:
            InputError: it has other sizes, computes something else, has weights that have nothing in common with the
                lens's model, or its writing weights are centred and the lens's were not (or the other way round).
                Another name, folded norms, and fine-tuned weights are no error: they share the base model's stream.
        """
        cfg, here = model.cfg, LensBasis.of(model)
        for name in ("n_layers", "d_model"):
            if (own := getattr(self, name)) != (given := getattr(cfg, name)):
                raise InputError(
                    f"This lens was fitted on {self.model_name!r} with {name}={own}; {cfg.model_name!r} has "
                    f"{name}={given}. Fit a lens on this model."
                )
        if self.is_centred != here.is_centred:
            fitted = "" if self.is_centred else "not "
            raise InputError(
                f"This lens was fitted on a model whose writing weights were {fitted}centred; this model's stream has "
                "another mean. Load the model with from_pretrained(..., "
                f"center_writing_weights={self.is_centred}), or fit a lens on this one."
            )
        if self.origin is None or here.origin is None:
            return
        if differences := self.origin.differences_of_stream(here.origin):
            raise InputError(
                f"This lens was fitted on another model, {self.model_name!r}: {'; '.join(differences[:4])}. Fit a lens "
                "on this model."
            )

    def is_the_same_as(self, other: "LensBasis") -> bool:
        """Whether both bases are of one model, up to rounding."""
        if self.origin is None or other.origin is None:
            return dataclasses.replace(self, origin=None) == dataclasses.replace(other, origin=None)
        return not self.origin.differences(other.origin)


def save_lens(
    path: str | os.PathLike[str],
    kind: str,
    arrays: Mapping[str, jax.Array],
    basis: LensBasis,
    details: Mapping[str, Any],
) -> None:
    """Writes a lens as one safetensors file, with the basis and ``details`` (plain values) in its header."""
    flat = {name: value for name, value in vars(basis).items() if name != "origin"}
    origin = None if basis.origin is None else basis.origin.to_dict()
    write_own(path, _format(kind), arrays, basis=flat, details=dict(details), model=origin)


def load_lens(
    path: str | os.PathLike[str],
    kind: str,
    details: Mapping[str, Any],
    shapes: Callable[[LensBasis, Mapping[str, Any]], Mapping[str, tuple[int | None, ...]]],
) -> tuple[dict[str, jax.Array], LensBasis, dict[str, Any]]:
    """Reads a lens that :func:`save_lens` wrote.

    Args:
        path: the file.
        kind: the kind of lens, such as ``"tuned"``.
        details: the form that the details must have, as :func:`tljax.schema.mismatch` takes it.
        shapes: returns each array's shape, given the basis and the details; ``None`` stands for any size.

    Raises:
        CheckpointError: the file is missing, damaged, or something else.
    """
    fields = {"basis": _BASIS, "details": dict(details), "model?": (None, FORM)}
    arrays, header = read_own(path, _format(kind), f"a {kind} lens that tljax saved", _REMEDY, fields=fields)
    with own_errors(path, _REMEDY, CheckpointError):
        origin = header.get("model") and Fingerprint.from_dict(header["model"])
        basis = LensBasis(**header["basis"], origin=origin)
        expected = shapes(basis, header["details"])
        if arrays.keys() != expected.keys():
            raise ValueError(f"it holds the arrays {sorted(arrays)}, not {sorted(expected)}")
        for name, array in arrays.items():
            sizes = zip(array.shape, expected[name], strict=False)
            fits = array.ndim == len(expected[name]) and all(size in (found, None) for found, size in sizes)
            if not fits or not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(f"{name} cannot be {array.dtype}{list(array.shape)}")
    return arrays, basis, header["details"]


def _format(kind: str) -> str:
    return f"tljax-{kind}-lens-1"
