"""One tiny checkpoint of a family with everything that several tests ask of it, computed once.

Compiling is nearly all that these tests cost, so they share few programs of few shapes: the plain run of ``TOKENS``
that keeps every point, and one run with a switched-off hook at every point, whose rows are the experiments.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hf_models import make_hf_model

from tljax import ActivationCache, HookedTransformer, Replace, Scale

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 40, (2, 24)).astype(np.int32)
LENGTH = 18
PROMPT = TOKENS[0, :LENGTH]
SHORT = RNG.integers(2, 40, 5).astype(np.int32)
FEW_VARIANTS = ("gpt2", "neox", "bloom", "gemma3_gqa_tied", "mixtral_gqa")
"""Variants for what is slow and differs little between families: they have every point but ``ONLY_SLOWER``."""
ONLY_SLOWER = ("latent", "mlp.hook_shared_gate", "mlp.shared.")
"""Parts of the names of points that tests/model/test_running.py has instead, on smaller models."""
SPLIT_INPUTS = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


def is_split_input(name: str) -> bool:
    """Whether naming the point makes the heads read apart, which changes the shapes of others."""
    return name.endswith(SPLIT_INPUTS)


@dataclasses.dataclass(frozen=True)
class Edit:
    """What one row of a switched run does at one point; ``value`` and ``where`` broadcast to a row's activation."""

    point: str
    value: Any = 0.0
    where: Any = True


class FamilyCase:
    """A variant of ``hf_models.VARIANTS``.

    Attributes:
        name: the variant.
        directory: its checkpoint.
        hf: transformers' model, in float32.
        raw: the same in tljax, without weight processing.
        figures: what the tests found out, for the table of supported models.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.hf = make_hf_model(name, directory)
        self.raw = HookedTransformer.from_pretrained_no_processing(directory)
        self.figures: dict[str, Any] = {"architecture": self.raw.cfg.original_architecture}

    @functools.cached_property
    def expected(self) -> np.ndarray:
        """transformers' logits of ``TOKENS``."""
        return hf_logits(self.hf, TOKENS)

    @functools.cached_property
    def run(self) -> tuple[np.ndarray, ActivationCache]:
        """Raw logits of ``TOKENS`` and every point that is not optional."""
        logits, cache = self.raw.run_with_cache(TOKENS)
        return np.asarray(logits), cache

    @functools.cached_property
    def points(self) -> list[str]:
        """Every point in firing order, but for those that make the heads read apart."""
        return [point.name for point in self.raw.hook_points() if not is_split_input(point.name)]

    @functools.cached_property
    def split_points(self) -> list[str]:
        """The points that make the heads read apart."""
        return [point.name for point in self.raw.hook_points() if is_split_input(point.name)]

    @property
    def n_rows(self) -> int:
        """Rows of a switched run: one for each point, one untouched, two more for padded prompts."""
        return len(self.points) + 3

    def switched(self, names: Sequence[str], edits: Sequence[Edit | None] = ()) -> HookedTransformer:
        """The model with a hook at each of ``names``; row ``n`` of a run does what ``edits[n]`` says.

        Which row does what is data, so that every call shares its programs. What something is divided by is doubled
        instead, at every other position: doubled everywhere, a later norm may undo it.
        """
        table = {point.name: point for point in self.raw.hook_points()}
        hooks = []
        for name in names:
            shape = table[name].shape(self.n_rows, LENGTH)
            whole = is_divisor(name) or name.endswith(("hook_resid_pre", "hook_z"))  # what the sweeps patch
            value = np.zeros(shape if whole else (1,) * len(shape), np.float32)
            mask = np.zeros(shape if whole else (shape[0],) + (1,) * (len(shape) - 1), np.float32)
            for row, edit in enumerate(edits):
                if edit is not None and edit.point == name:
                    mask[row, :: 2 if is_divisor(name) else 1] = edit.where
                    if whole:
                        value[row] = edit.value
            hooks.append((name, Scale(2.0, mask=mask) if is_divisor(name) else Replace(value, mask=mask)))
        return self.raw.with_hooks(hooks)

    @functools.cached_property
    def hooked(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits and every point of a run whose row ``n`` has point ``n`` zeroed.

        The rows after those: ``PROMPT`` untouched, then ``SHORT`` padded left and right.
        """
        model = self.switched(self.points, [Edit(name) for name in self.points])
        logits, cache = model.run_with_cache(self.rows(), attention_mask=self.mask(), names_filter=self.points)
        return np.asarray(logits), {name: np.asarray(value) for name, value in cache.items()}

    def rows(self) -> np.ndarray:
        """Tokens of the switched run ``[n_rows, LENGTH]``."""
        tokens = np.tile(PROMPT, (self.n_rows, 1))
        tokens[-2, -len(SHORT) :] = tokens[-1, : len(SHORT)] = SHORT
        return tokens

    def mask(self) -> np.ndarray:
        """Which of them are no padding."""
        mask = np.ones((self.n_rows, LENGTH), bool)
        mask[-2, : -len(SHORT)] = mask[-1, len(SHORT) :] = False
        return mask


def is_divisor(name: str) -> bool:
    """Whether the activation is one that something is divided by."""
    return name.endswith("hook_scale")


def hf_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits in float32."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def largest(got: Any, expected: Any) -> float:
    """Largest absolute difference; infinite where exactly one is finite."""
    got, expected = (np.asarray(array).astype(np.float64) for array in (got, expected))
    if not np.array_equal(np.isfinite(got), finite := np.isfinite(expected)):
        return float("inf")
    return float(np.abs(got[finite] - expected[finite]).max(initial=0.0))


def log_softmax(logits: Any) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
