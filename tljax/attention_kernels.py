"""Kernels of attention that jax has for one kind of device, and which models they can serve."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tljax.config import HookedTransformerConfig

CUDNN, SPLASH = "cudnn", "splash"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of attention.

    Attributes:
        name: what ``cfg.attention_path`` calls it.
        words: what it is, in words.
        backend: the name of its devices' backend, as ``jax.default_backend()`` has it.
        platform: what a program is lowered for on these devices.
        serves: what attention may need besides the usual (:func:`needs`), and the kernel has.
        padding: whether it can leave out keys at padding.
        dtypes: those that it takes.
        widest: most dimensions of a head.
        multiple: what these must be a multiple of.
    """

    name: str
    words: str
    backend: str
    platform: str
    serves: frozenset[str]
    padding: bool
    dtypes: tuple[str, ...]
    widest: int
    multiple: int

    def lacks(self, cfg: "HookedTransformerConfig", local: bool) -> str | None:
        """Returns what a layer needs and the kernel does not have, or ``None``.

        Args:
            cfg: the model's config.
            local: whether the layer's attention has a window.
        """
        if cfg.dtype not in self.dtypes:
            return f"it takes {' and '.join(self.dtypes)}, and the model's dtype is {cfg.dtype}"
        for need in needs(cfg, local):
            if need not in self.serves:
                return f"it has no {need}"
        if cfg.d_head > self.widest or cfg.d_head % self.multiple:
            multiples = f"multiples of {self.multiple} " if self.multiple > 1 else ""
            return f"it takes heads of {multiples}up to {self.widest} dimensions, and d_head is {cfg.d_head}"
        return None


SOFT_CAP, WINDOW = "soft cap on scores", "window"
BOTH_DIRECTIONS, WINDOW_AHEAD = "attention in both directions", "window in both directions"

KERNELS = {
    kernel.name: kernel
    for kernel in (
        # Without causal masking jax gives cuDNN a window's left end alone (jax-ml/jax#39576): no WINDOW_AHEAD.
        Kernel(
            CUDNN, "cuDNN's kernel", "gpu", "cuda", frozenset({WINDOW, BOTH_DIRECTIONS}), padding=False,
            dtypes=("bfloat16", "float16"), widest=128, multiple=8,
        ),
        Kernel(
            SPLASH, "jax's splash kernel", "tpu", "tpu", frozenset({WINDOW, SOFT_CAP}), padding=True,
            dtypes=("bfloat16",), widest=256, multiple=1,
        ),
    )
}  # fmt: skip
"""Each by its name. None takes float32, whose products the hardware under them would round."""


def needs(cfg: "HookedTransformerConfig", local: bool) -> Iterator[str]:
    """Yields what a layer's attention needs besides causal masking, a scale and heads that share a key."""
    causal = cfg.attention_dir == "causal"
    if not causal:
        yield BOTH_DIRECTIONS
    if local:
        yield WINDOW if causal else WINDOW_AHEAD
    if cfg.attn_scores_soft_cap > 0:
        yield SOFT_CAP
    if cfg.use_attention_sinks:
        yield "attention sinks"
    if cfg.positional_embedding_type == "alibi":
        yield "ALiBi"
    if cfg.scale_attn_by_inverse_layer_idx:
        yield "scale of a layer's own"
    if cfg.d_value not in (None, cfg.d_head):
        yield "values of another width than keys"


def refusal(cfg: "HookedTransformerConfig") -> str | None:
    """Returns why ``cfg.attention_path`` names a kernel that cannot serve the model, or ``None``."""
    if (kernel := KERNELS.get(cfg.attention_path)) is None:
        return None
    windows = {kind == "local" for kind in cfg.attn_types or ()} if cfg.use_local_attn else {False}
    reasons = [reason for local in sorted(windows) if (reason := kernel.lacks(cfg, local)) is not None]
    return f"{kernel.words} cannot serve this model: {reasons[0]}" if reasons else None
