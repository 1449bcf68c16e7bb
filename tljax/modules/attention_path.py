"""Which way attention takes: the whole matrix of scores, some queries at a time, or a kernel of the device's."""

import dataclasses

import jax

from tljax.attention_kernels import CUDNN, KERNELS, Kernel
from tljax.config import HookedTransformerConfig, LayerKind
from tljax.modules.kernels import cudnn_refusal

MATRICES = ("hook_attn_scores", "hook_pattern")
"""The points of attention whose values are ``[batch, head, query_pos, key_pos]``."""
MATERIALISED, BLOCKWISE = "materialised", "blockwise"
SHORT_TEXT = 256
"""Most keys for which the matrix is made all the same: smaller blocks would not be faster."""
FEW_QUERIES = 64
"""Fewer queries than this make no large matrix: a step of decoding, a packed run's short suffixes."""


@dataclasses.dataclass(frozen=True)
class AttentionPath:
    """The way that attention takes in one layer.

    Attributes:
        name: ``"materialised"``: scores and pattern ``[batch, head, query_pos, key_pos]`` are made; ``"blockwise"``:
            those of some queries at a time; ``"cudnn"`` and ``"splash"``: a kernel on its own devices, and by blocks
            where the same program is compiled for others.
        why: the reason, in words.
    """

    name: str
    why: str

    def on_default_device(self) -> "AttentionPath":
        """Returns the way on jax's default device: a kernel of other devices is replaced by blocks there."""
        kernel, backend = KERNELS.get(self.name), jax.default_backend()
        if kernel is None or kernel.backend == backend:
            return self
        return AttentionPath(BLOCKWISE, f"{self.why}, which runs on a {kernel.backend.upper()}; this is a {backend}")


def attention_path(
    cfg: HookedTransformerConfig,
    kind: LayerKind,
    queries: int,
    keys: int,
    named: bool,
    whole: bool = True,
    padded: bool = False,
) -> AttentionPath:
    """Returns the path of one layer's attention.

    It depends on what a program is compiled for (config, shapes, named points) and on the devices that this process
    has, so choosing compiles nothing more.

    Args:
        cfg: the model's config.
        kind: the layer's kind.
        queries: number of queries of a prompt.
        keys: number of keys of a prompt.
        named: whether scores or pattern are named in the run: captured, hooked, or changed by a dictionary.
        whole: whether query and key ``n`` are both at position ``n``, so not with cached keys and in packed runs.
        padded: whether some keys are padding.
    """
    if named:
        return AttentionPath(MATERIALISED, "the run names this layer's scores or pattern")
    if (kernel := KERNELS.get(cfg.attention_path)) is not None:
        return _by_kernel(cfg, kind, kernel, whole, padded, f"cfg.attention_path is {cfg.attention_path!r}")
    if cfg.attention_path != "auto":
        return AttentionPath(cfg.attention_path, f"cfg.attention_path is {cfg.attention_path!r}")
    if keys <= SHORT_TEXT:
        return AttentionPath(MATERIALISED, f"no more than {SHORT_TEXT} keys")
    if queries < FEW_QUERIES:
        return AttentionPath(MATERIALISED, f"fewer than {FEW_QUERIES} queries")
    why = f"more than {SHORT_TEXT} keys, and nothing names scores or pattern"
    backend = jax.default_backend()
    for kernel in KERNELS.values():
        if kernel.backend == backend:
            several = jax.device_count() if kernel.name != CUDNN else 1
            if several > 1:
                return AttentionPath(BLOCKWISE, f"{why}; XLA cannot split {kernel.words} over {several} devices")
            return _by_kernel(cfg, kind, kernel, whole, padded, why)
    return AttentionPath(BLOCKWISE, why)


def _by_kernel(
    cfg: HookedTransformerConfig, kind: LayerKind, kernel: Kernel, whole: bool, padded: bool, why: str
) -> AttentionPath:
    """Returns the kernel's path, or blocks with the reason why the kernel cannot serve the run."""
    cannot = kernel.lacks(cfg, kind.local)
    if cannot is None and not whole:
        cannot = "keys are cached or packed"
    if cannot is None and padded and not kernel.padding:
        cannot = "it cannot leave out padding"
    if cannot is None and kernel.name == CUDNN:
        cannot = cudnn_refusal(cfg.dtype, cfg.d_head)
    if cannot is None:
        return AttentionPath(kernel.name, why)
    return AttentionPath(BLOCKWISE, f"{why}; not {kernel.words}: {cannot}")


def spliced_at_matrix(kind: LayerKind) -> bool:
    """Whether a dictionary is spliced in at a layer's scores or pattern."""
    return any(point.endswith(MATRICES) for splice in kind.splices for point in (splice.reads, splice.writes))
