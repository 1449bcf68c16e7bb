"""Tiny checkpoints of families whose attention and MLP may read the same input."""

from typing import Any

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {}
