"""Tiny checkpoints of families in Llama's manner: RMS norms, rotary, gated MLPs."""

from typing import Any

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {}
