"""The axis names and array types used in every public signature.

Axis names are the ones hook points carry (``HookPoint.axes``), so a shape in a signature, a column of the hook
table and a keyword of an intervention all read the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

Tokens = Int[Array, "batch pos"]
Residual = Float[Array, "batch pos d_model"]
Logits = Float[Array, "batch pos d_vocab_out"]

Params = dict[str, Any]
"""Nested parameters: ``{"embed": {...}, "blocks": ({...}, ...), "ln_final": {...}, "unembed": {...}}``."""

ReturnType = Literal["logits", "loss", "both"] | None
PaddingSide = Literal["left", "right"]

HookFunction = Callable[..., Any]
HookName = str | Callable[[str], bool] | Any
HookList = Sequence[tuple[Any, HookFunction]]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
DeviceLike = str | jax.Device | jax.sharding.Sharding | None

AxisIndex = Any
Captured = Mapping[str, Array]
