"""What a dictionary computes, and where it belongs: its config and its tap."""

import dataclasses
from typing import Any, Literal

from tljax.checks import check_fields
from tljax.errors import DictionaryError

Architecture = Literal[
    "standard", "gated", "jumprelu", "topk", "abstopk", "batchtopk", "groupmax", "matching_pursuit", "temporal"
]
"""How pre-activations become features: SAELens's names, with sparsify's ``groupmax``.

``batchtopk`` selects over the whole batch, as in training; for inference such a dictionary is a ``jumprelu`` one.
"""

NormalizeActivations = Literal[
    "none", "expected_average_only_in", "covariance_whitening", "constant_norm_rescale", "layer_norm",
    "constant_scalar_rescale", "center",
]  # fmt: skip
"""What happens to activations before they are encoded: SAELens's names, and tljax's own ``center``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tap:
    """Where a dictionary reads and writes, and the activations that it was trained on.

    Attributes:
        reads: full name of the hook point that is encoded, such as ``"blocks.8.hook_resid_pre"``; ``None`` if unknown.
        writes: full name of the point that is reconstructed, if that is another one (transcoders).
        model_name: the model, as the dictionary's files name it.
        head: the one head that is read; ``None`` means all.
        merged_heads: whether heads ``[n_heads, d_head]`` are read as one vector.
        processing: the weight processing that the activations were taken under: names of steps, such as
            ``("center_writing_weights",)``, empty for raw weights; ``None`` if unknown.
        gain: whether a normalised activation that is read has been multiplied by the norm's weight; ``None`` where the
            point itself says so.
    """

    reads: str | None = None
    writes: str | None = None
    model_name: str | None = None
    head: int | None = None
    merged_heads: bool = False
    processing: tuple[str, ...] | None = None
    gain: bool | None = None

    def replace(self, **changes: Any) -> "Tap":
        """Returns a copy with ``changes`` applied."""
        return dataclasses.replace(self, **changes)

    def known(self, **facts: Any) -> "Tap":
        """Returns a copy in which facts that are unknown here are taken from ``facts``."""
        return self.replace(**{name: value for name, value in facts.items() if getattr(self, name) is None})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DictionaryConfig:
    """What a dictionary computes. Frozen and hashable: the static part of compiled programs.

    Attributes:
        architecture: how pre-activations become features.
        d_in: width of what is encoded.
        d_sae: number of features.
        d_out: width of what is reconstructed; ``None`` means ``d_in``.
        k: features kept for each token (``topk``, ``abstopk``, ``groupmax``; for ``batchtopk`` on average).
        normalize_activations: what happens to activations before they are encoded.
        apply_b_dec_to_input: whether ``b_dec`` is subtracted before encoding.
        rescale_acts_by_decoder_norm: whether features are selected by their value times the decoder row's norm.
        transcoder: whether another activation than the one encoded is reconstructed: the input's normalisation is then
            not undone in the output.
        max_iterations, residual_threshold, stop_on_duplicate_support: of matching pursuit; see
            :mod:`tljax.dictionaries.maths.matching_pursuit`. ``max_iterations=None`` means ``d_in``.
        n_attn_heads, n_attn_layers, bottleneck_factor, tied_weights, scale, novel: of a temporal dictionary; see
            :mod:`tljax.dictionaries.maths.temporal`.
        matryoshka_widths: prefixes of the features that reconstruct alone, in training; ends with ``d_sae``.
        tap: where the dictionary belongs.
        metadata: what else its files say, as pairs of a key and JSON text.
    """

    architecture: Architecture = "standard"
    d_in: int
    d_sae: int
    d_out: int | None = None
    k: int | None = None
    normalize_activations: NormalizeActivations = "none"
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    transcoder: bool = False
    max_iterations: int | None = None
    residual_threshold: float = 0.0
    stop_on_duplicate_support: bool = True
    n_attn_heads: int = 8
    n_attn_layers: int = 1
    bottleneck_factor: int = 1
    tied_weights: bool = True
    scale: float = 1.0
    novel: Literal["topk", "relu"] = "topk"
    matryoshka_widths: tuple[int, ...] = ()
    tap: Tap = Tap()
    metadata: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, DictionaryError)
        for name in ("d_in", "d_sae", "d_out"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise DictionaryError(f"{name}={size} must be at least 1.")
        if self.architecture in ("topk", "abstopk", "batchtopk", "groupmax"):
            if self.k is None:
                raise DictionaryError(f'architecture="{self.architecture}" needs k, how many features a token keeps.')
            if not 1 <= self.k <= self.d_sae:
                raise DictionaryError(f"k={self.k} must lie between 1 and d_sae={self.d_sae}.")
        if self.architecture == "groupmax" and self.d_sae % (self.k or 1):
            raise DictionaryError(f"groupmax splits d_sae={self.d_sae} features into k={self.k} equal groups.")
        if self.transcoder and self.apply_b_dec_to_input:
            raise DictionaryError(
                "A transcoder's b_dec belongs to its output, so it is not subtracted from its input: "
                "apply_b_dec_to_input=False."
            )
        if not self.transcoder and self.d_out not in (None, self.d_in):
            raise DictionaryError(
                f"d_out={self.d_out} differs from d_in={self.d_in}, so this is a transcoder: transcoder=True, "
                "apply_b_dec_to_input=False."
            )

    @property
    def output_width(self) -> int:
        """Width of what is reconstructed."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def computation(self) -> "DictionaryConfig":
        """The config that programs are compiled for: without the metadata, and of the tap whether heads are merged."""
        return dataclasses.replace(self, tap=Tap(merged_heads=self.tap.merged_heads), metadata=())

    def replace(self, **changes: Any) -> "DictionaryConfig":
        """Returns a copy with ``changes`` applied and validated."""
        return dataclasses.replace(self, **changes)


CodeNormalization = Literal["none", "crosscoder", "sae", "mixed", "decoupled"]
"""What a crosscoder's features are multiplied by where they are selected: see :class:`CrosscoderConfig`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrosscoderConfig:
    """What a crosscoder computes. Frozen and hashable.

    Attributes:
        n_sources: number of layers or models that it reads and reconstructs.
        d_in: width of each.
        d_sae: number of features.
        architecture: ``"standard"``, ``"jumprelu"``, ``"topk"`` or ``"batchtopk"``.
        k: features kept for each token, for the last two.
        code_normalization: what features are multiplied by where they are compared to thresholds and to each other;
            their values stay as they are. With ``n_i`` the norm of a feature's direction in source ``i``: ``"none"`` 1;
            ``"crosscoder"`` the sum of the ``n_i``; ``"sae"`` the root of the sum of their squares; ``"mixed"``
            ``alpha_sae`` of the second and ``alpha_cc`` of the first; ``"decoupled"`` ``n_i`` for source ``i``, so that
            a feature may be selected for one source and not for another.
        alpha_sae, alpha_cc: of ``"mixed"``.
        scale_eps: added to ``scale`` where the reconstruction is divided by it.
        taps: where each source is read; empty if unknown.
        metadata: what else its files say, as pairs of a key and JSON text.
    """

    n_sources: int
    d_in: int
    d_sae: int
    architecture: Architecture = "standard"
    k: int | None = None
    code_normalization: CodeNormalization = "none"
    alpha_sae: float = 1.0
    alpha_cc: float = 0.1
    scale_eps: float = 0.0
    taps: tuple[Tap, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, DictionaryError)
        if self.architecture not in ("standard", "jumprelu", "topk", "batchtopk"):
            raise DictionaryError(f"A crosscoder cannot be {self.architecture!r}.")
        if self.taps and len(self.taps) != self.n_sources:
            raise DictionaryError(f"{len(self.taps)} taps were given for n_sources={self.n_sources}.")

    @property
    def selection(self) -> DictionaryConfig:
        """The config by which pre-activations become features."""
        return DictionaryConfig(architecture=self.architecture, d_in=self.d_in, d_sae=self.d_sae, k=self.k)

    @property
    def computation(self) -> "CrosscoderConfig":
        """The config that programs are compiled for."""
        return dataclasses.replace(self, taps=(), metadata=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossLayerConfig:
    """What a cross-layer transcoder computes. Frozen and hashable.

    Attributes:
        n_layers: number of layers; all are read and written.
        d_in: width of what is read and written.
        d_sae: features of each layer.
        jumprelu: whether features below a threshold are zero; ReLU alone otherwise.
        taps: where each layer is read and written; empty if unknown.
        metadata: what else its files say, as pairs of a key and JSON text.
    """

    n_layers: int
    d_in: int
    d_sae: int
    jumprelu: bool = False
    taps: tuple[Tap, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()

    @property
    def computation(self) -> "CrossLayerConfig":
        """The config that programs are compiled for."""
        return dataclasses.replace(self, taps=(), metadata=())
