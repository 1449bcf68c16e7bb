"""Tiny checkpoints of families in GPT-2's manner: layer norms, plain MLPs."""

from typing import Any

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {}
