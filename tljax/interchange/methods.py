"""Trained methods: what is learned of an interchange, and with which schedule."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.hooks.interchanges import boundary_gate, mask_gate
from tljax.interchange.programs import Subspace

Trained = Literal["das", "mdas", "boundless", "dbm"]
"""``"das"``: a subspace of given rank (Geiger et al. 2023). ``"mdas"``: the same on cause and iso pairs together (Huang
et al. 2024). ``"boundless"``: a rotation and a boundary (Wu et al. 2023). ``"dbm"``: a mask over fixed coordinates."""

Learned = dict[str, Any]
"""What is trained, by name."""

_LEAST_BOUNDARY = 1e-3
_RATES = {
    "das": {"free": 1e-2}, "mdas": {"free": 1e-2}, "boundless": {"free": 1e-3, "boundary": 1e-2},
    "dbm": {"mask_logits": 1e-2},
}  # fmt: skip
_PENALTIES = {"das": 0.0, "mdas": 0.0, "boundless": 1.0, "dbm": 1e-4}
_TEMPERATURES = {"das": (0.0, 0.0), "mdas": (0.0, 0.0), "boundless": (50.0, 0.1), "dbm": (1.0, 1e-3)}
_WARM_UP = 0.1
_START = np.float32(0.25)
"""Length of the free columns at the start. Only their directions matter, so the shorter they are the faster a given
learning
rate turns them: at 1 they turn half as fast as TransformerLens's (torch's Householder products), and end higher."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A trained method; static for compiled programs.

    Attributes:
        name: which.
        width: size of the activation's last axis.
        tie_masks: whether a DBM has one mask for all coordinates.
    """

    name: Trained
    width: int
    tie_masks: bool = False

    def start(self, seed: int, n: int) -> Learned:
        """Draws starting values on the host. A smaller ``n`` starts from the first columns of a larger one.

        Args:
            seed: the random seed.
            n: number of columns.
        """
        if self.name == "dbm":
            return {"mask_logits": np.zeros(1 if self.tie_masks else n, np.float32)}
        rows = np.random.default_rng(seed).standard_normal((n, self.width))
        free = _START * np.linalg.qr(rows.T)[0].astype(np.float32)
        return {"free": free} | ({"boundary": np.float32(0.5)} if self.name == "boundless" else {})

    def subspace(self, learned: Learned, fixed: Subspace, temperature: Any) -> Subspace:
        """Returns the coordinates to set: the learned part, and what is fixed of columns and gates."""
        if self.name == "dbm":
            return Subspace(fixed.columns, mask_gate(learned["mask_logits"], fixed.gate.shape[-1], temperature))
        columns = _orthonormalised(learned["free"])
        if self.name == "boundless":
            return Subspace(columns, boundary_gate(learned["boundary"], columns.shape[-1], temperature))
        return Subspace(columns, fixed.gate)

    def penalty(self, learned: Learned, fixed: Subspace, temperature: Any) -> jax.Array:
        """Returns the size of the gate that the loss counts: the boundary, or the sum of the mask."""
        if self.name == "boundless":
            return learned["boundary"]
        if self.name == "dbm":
            return mask_gate(learned["mask_logits"], fixed.gate.shape[-1], temperature).sum()
        return jnp.zeros(())

    def project(self, learned: Learned) -> Learned:
        """Returns the learned numbers within their bounds, after a step."""
        if self.name == "boundless":
            return learned | {"boundary": jnp.clip(learned["boundary"], _LEAST_BOUNDARY, 1.0)}
        return learned

    def rates(self, lr: float | dict[str, float] | None) -> dict[str, np.float32]:
        """Returns the learning rate of each learned part; a number replaces that of the first part alone."""
        rates = dict(_RATES[self.name])
        if isinstance(lr, dict):
            rates |= lr
        elif lr is not None:
            rates[next(iter(rates))] = lr
        return {name: np.float32(rate) for name, rate in rates.items()}

    def default_penalty(self) -> float:
        return _PENALTIES[self.name]

    def schedule(self, steps: int, temperature: tuple[float, float] | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns for each step the factor of the learning rates, and the temperature.

        Boundless DAS warms up for a tenth of the steps, then falls linearly to zero, and its temperature falls
        linearly. A DBM's temperature falls geometrically in the first half and stays.
        """
        first, last = _TEMPERATURES[self.name] if temperature is None else temperature
        along = np.linspace(0, 1, steps) if steps > 1 else np.ones(1)
        if self.name == "boundless":
            warm = max(1, round(_WARM_UP * steps))
            count = np.arange(1, steps + 1)
            factor = np.minimum(count / warm, (steps - count + 1) / max(1, steps - warm))
            return factor.astype(np.float32), (first + (last - first) * along).astype(np.float32)
        if self.name == "dbm":
            return np.ones(steps, np.float32), (first * (last / first) ** np.minimum(2 * along, 1)).astype(np.float32)
        return np.ones(steps, np.float32), np.zeros(steps, np.float32)


def _orthonormalised(free: jax.Array) -> jax.Array:
    """Returns the orthonormal factor of a free matrix, whose first ``r`` columns span those of its own first ``r``."""
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.qr(free)[0]
