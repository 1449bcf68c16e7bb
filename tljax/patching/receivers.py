"""Reads the receivers of path patching from the form in which users write them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, nearest
from tljax.hooks.points import ENTRY

_POINTS = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "mlp": "hook_mlp_in"}


@dataclasses.dataclass(frozen=True)
class Receiver:
    """A reader of the residual stream: queries, keys or values of heads, an MLP, or the logits.

    Attributes:
        layer: its layer; ``n_layers`` for the logits.
        point: the hook point that is patched to change what it reads, named within its block.
        head: the head; ``None`` means all heads.
    """

    layer: int
    point: str
    head: int | None = None


def read_receivers(cfg: HookedTransformerConfig, receivers: Sequence[tuple[Any, ...] | str] | str) -> list[Receiver]:
    """Checks receivers and converts them.

    Raises:
        InputError: an unknown kind, a layer or head that does not exist, ``"logits"`` among others, or no receiver.
    """
    if receivers == "logits" or list(receivers) == ["logits"]:
        return [Receiver(cfg.n_layers, ENTRY)]
    if isinstance(receivers, tuple) and receivers and receivers[0] in _POINTS:
        receivers = [receivers]
    if isinstance(receivers, str) or not receivers:
        raise InputError(f'receivers={receivers!r}: give "logits" or a list such as [("q", 9, 6), ("mlp", 10)].')
    return [_read(cfg, receiver) for receiver in receivers]


def _read(cfg: HookedTransformerConfig, receiver: Any) -> Receiver:
    if receiver == "logits":
        raise InputError(
            '"logits" cannot be one receiver among others: the others reach the logits too. Give it alone.'
        )
    if not isinstance(receiver, tuple) or len(receiver) not in (2, 3) or receiver[0] not in _POINTS:
        kind = receiver[0] if isinstance(receiver, tuple) and receiver else receiver
        raise InputError(
            f'Receiver {receiver!r} is not of the form ("q", layer, head), ("k", …), ("v", …) or ("mlp", layer).'
            f"{nearest(str(kind), _POINTS)}"
        )
    kind, layer, head = receiver[0], receiver[1], receiver[2] if len(receiver) == 3 else None
    if kind == "mlp" and (cfg.attn_only or head is not None):
        raise InputError(
            f"Receiver {receiver!r}: {'this model has no MLPs' if cfg.attn_only else 'an MLP has no heads'}."
        )
    heads = cfg.n_heads if kind == "q" else cfg.kv_heads
    for name, number, size in (("layer", layer, cfg.n_layers), ("head", head, heads)):
        every = name == "head" and number is None
        if not every and not (isinstance(number, int | np.integer) and -size <= number < size):
            raise InputError(
                f"Receiver {receiver!r}: {name} {number!r} does not exist; there are {size}, numbered 0 to {size - 1}."
            )
    return Receiver(int(layer) % cfg.n_layers, _POINTS[kind], None if head is None else int(head) % heads)
