"""The types that public signatures share: parameters, hook lists, filters, devices, options of an input."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict

import jax

Params = dict[str, Any]
"""Nested parameters: ``{"embed": {...}, "blocks": ({...}, ...), "ln_final": {...}, "unembed": {...}}``."""

ReturnType = Literal["logits", "loss", "both"] | None
PaddingSide = Literal["left", "right"]

HookFunction = Callable[..., Any]
HookList = Sequence[tuple[Any, HookFunction]]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
DeviceLike = str | jax.Device | jax.sharding.Sharding | None


class PromptOptions(TypedDict, total=False):
    """Options for reading a prompt."""

    prepend_bos: bool | None
    padding_side: PaddingSide | None
    attention_mask: Any


class InputOptions(PromptOptions, total=False):
    """Options for reading an input of the model, documented at :meth:`tljax.HookedTransformer.__call__`."""

    start_at_layer: int | None
    tokens: Any
