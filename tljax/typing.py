"""The types that public signatures share: parameters, hook lists, filters, devices."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

Params = dict[str, Any]
"""Nested parameters: ``{"embed": {...}, "blocks": ({...}, ...), "ln_final": {...}, "unembed": {...}}``."""

ReturnType = Literal["logits", "loss", "both"] | None
PaddingSide = Literal["left", "right"]

HookFunction = Callable[..., Any]
HookList = Sequence[tuple[Any, HookFunction]]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
DeviceLike = str | jax.Device | jax.sharding.Sharding | None
