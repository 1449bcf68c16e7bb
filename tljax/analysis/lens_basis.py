"""What a fitted lens belongs to: the model whose residual stream it was fitted on; and lenses on disk."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.safetensors_files import read_own, write_own


@dataclasses.dataclass(frozen=True, kw_only=True)
class LensBasis:
    """The residual stream that a lens was fitted on.

    Attributes:
        model_name: the model's name.
        n_layers, d_model: its shape.
        is_centred: whether writing weights were centred, which takes the mean out of every vector of the stream.
    """

    model_name: str
    n_layers: int
    d_model: int
    is_centred: bool

    @classmethod
    def of(cls, cfg: HookedTransformerConfig) -> "LensBasis":
        """The basis of a model."""
        return cls(
            model_name=cfg.model_name,
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            is_centred="center_writing_weights" in cfg.weight_processing,
        )

    def check(self, cfg: HookedTransformerConfig) -> None:
        """Checks that a model has this residual stream.

        Raises:
            InputError: it has another shape, or its writing weights are centred and the lens's were not (or the other
                way round). Another name alone is no error: fine-tuned models share their base model's stream.
        """
        for name in ("n_layers", "d_model"):
            if (own := getattr(self, name)) != (given := getattr(cfg, name)):
                raise InputError(
                    f"This lens was fitted on {self.model_name!r} with {name}={own}; {cfg.model_name!r} has "
                    f"{name}={given}. Fit a lens on this model."
                )
        if self.is_centred != LensBasis.of(cfg).is_centred:
            fitted = "" if self.is_centred else "not "
            raise InputError(
                f"This lens was fitted on a model whose writing weights were {fitted}centred; this model's stream has "
                "another mean. Load the model with from_pretrained(..., "
                f"center_writing_weights={self.is_centred}), or fit a lens on this one."
            )


def save_lens(
    path: str | os.PathLike[str],
    kind: str,
    arrays: Mapping[str, jax.Array],
    basis: LensBasis,
    details: Mapping[str, Any],
) -> None:
    """Writes a lens as one safetensors file: arrays, the basis and ``details`` (plain values) in the header."""
    write_own(path, _format(kind), arrays, basis=dataclasses.asdict(basis), details=dict(details))


def load_lens(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, jax.Array], LensBasis, dict[str, Any]]:
    """Reads what :func:`save_lens` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or something else.
    """
    arrays, header = read_own(path, _format(kind), f"a {kind} lens that tljax saved", "Save the lens again.")
    return arrays, LensBasis(**header["basis"]), header["details"]


def _format(kind: str) -> str:
    return f"tljax-{kind}-lens-1"
