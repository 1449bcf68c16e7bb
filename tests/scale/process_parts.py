"""What the tests of several processes and their children share."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tljax.dictionaries.training import TrainingConfig

ROWS = np.random.default_rng(0).integers(1, 900, (26, 16)).astype(np.int32)
POINTS = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z"]
HARVEST: dict[str, Any] = {
    "batch_size": 4, "shard_bytes": 40_000, "covariance": True, "skip_special": [5, 6, 7], "max_norm_ratio": 1.3,
    "progress": False,
}  # fmt: skip
"""Four shards of ``ROWS``."""
STEPS = 10
CFG = TrainingConfig(architecture="topk", d_in=8, d_sae=16, k=2, lr=1e-2)


class Stopped(Exception):
    """Stands for a run that is interrupted."""


def stops_at(step: int) -> Callable[[dict[str, Any]], None]:
    """Returns an ``on_log`` that interrupts the run."""

    def stop(logged: dict[str, Any]) -> None:
        if logged["step"] == step:
            raise Stopped

    return stop


def activations() -> np.ndarray:
    """Rows to train on, ``[512, 8]``."""
    return np.random.default_rng(3).standard_normal((512, 8), np.float32)
