"""What a dictionary is trained to do: ``TrainingConfig``."""

import dataclasses
from typing import Any, Literal

from tljax.checks import check_fields
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.maths.config import CrosscoderConfig, DictionaryConfig, NormalizeActivations, Tap
from tljax.errors import ConfigError

TrainedArchitecture = Literal["standard", "gated", "jumprelu", "topk", "abstopk", "batchtopk", "matching_pursuit"]
"""The architectures that can be trained, by SAELens's names; ``batchtopk`` with ``matryoshka_widths`` is Matryoshka."""

TOP_K = ("topk", "abstopk", "batchtopk")
"""Architectures that keep a number of features; dead ones are trained by an auxiliary loss."""

_BELONGS: dict[str, tuple[tuple[str, ...], str]] = {
    "k": (TOP_K, "how many features a token keeps"),
    "l1_coefficient": (("standard", "gated"), "the weight of the L1 penalty"),
    "l0_coefficient": (("jumprelu",), "the weight of the L0 penalty"),
    "l0_target": (("jumprelu",), "the L0 that a quadratic penalty aims at"),
    "pre_act_loss_coefficient": (("jumprelu",), "the weight of the pre-activation loss"),
    "aux_loss_coefficient": (TOP_K, "the weight of the auxiliary loss"),
    "matryoshka_widths": (("batchtopk",), "the prefixes of features that reconstruct alone"),
}
"""Field → the architectures it belongs to, and what it is."""

_NOWHERE = Tap()

DEFAULTS = {"l1_coefficient": 1.0, "l0_coefficient": 1.0, "aux_loss_coefficient": 1.0}
"""What ``None`` means."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the training of one dictionary. Defaults are SAELens's, where SAELens has them.

    A field that belongs to another architecture is refused, so that no setting is silently without effect.

    Attributes:
        d_in: width of what is encoded.
        d_sae: number of features.
        architecture: how pre-activations become features.
        d_out: width of what is reconstructed; ``None`` means ``d_in``.
        transcoder: whether another activation than the one encoded is reconstructed.
        skip: whether a transcoder has a skip connection, ``W_skip``.
        n_sources: number of layers or models of a crosscoder; ``None`` trains a dictionary.
        k: features that a token keeps (``topk``, ``abstopk``), or keeps on average (``batchtopk``).
        matryoshka_widths: prefixes of the features that reconstruct alone; ``d_sae`` is added at the end.
        rescale_acts_by_decoder_norm: whether ``topk``, ``abstopk`` and ``batchtopk`` select by a feature's value times
            the norm of its decoder row; other architectures ignore it.
        apply_b_dec_to_input: whether ``b_dec`` is subtracted before encoding; ``None`` means yes, except in transcoders
            and crosscoders.
        l1_coefficient: weight of the L1 penalty (``standard``, ``gated``); ``None`` means 1.
        l1_warm_up_steps: steps over which that weight increases from zero.
        lp_norm: p of the penalty ``(sum_i (f_i |W_dec_i|)^p)^(1/p)`` of ``standard``.
        gated_stop_gradient: whether the auxiliary loss of ``gated`` leaves the decoder alone, as in the paper and in
            dictionary_learning; SAELens does not.
        l0_coefficient: weight of the L0 penalty (``jumprelu``); ``None`` means 1.
        l0_warm_up_steps: steps over which that weight increases from zero.
        l0_target: makes the penalty ``2 / l0_target * (L0 - l0_target)^2`` for each token, as in Gemma Scope 2.
        jumprelu_sparsity_loss: ``"step"`` counts features; ``"tanh"`` sums ``tanh(scale * f * |W_dec|)``.
        jumprelu_bandwidth: width of the kernel of the straight-through estimators.
        jumprelu_init_threshold: threshold at the start.
        jumprelu_tanh_scale: scale of ``"tanh"``.
        jumprelu_ste_to_input: whether the estimators' gradient reaches the pre-activations, not the threshold alone.
        pre_act_loss_coefficient: weight of ``sum_dead ReLU(threshold - h) |W_dec|``; ``None`` leaves it out.
        aux_loss_coefficient: weight of the loss that trains dead features (``topk`` and relatives); ``None`` means 1.
        matryoshka_aux_loss: whether each prefix has an auxiliary loss of its own.
        topk_threshold_lr: rate at which ``batchtopk``'s threshold follows the smallest value that a batch keeps.
        max_iterations, residual_threshold, stop_on_duplicate_support: of matching pursuit.
        dead_feature_window: a feature that did not fire in more steps than this is dead.
        feature_sampling_window: steps over which firing rates are counted, for ``sparsity``.
        lr: the highest learning rate.
        lr_schedule: ``"constant"``, ``"cosine"`` to ``lr_end``, or ``"linear"`` to zero.
        lr_end: learning rate at the end of a cosine; ``None`` means a tenth of ``lr``.
        lr_warm_up_steps: steps of linear increase.
        lr_decay_steps: last steps, over which the rate falls linearly to zero.
        adam_beta1, adam_beta2, adam_eps: Adam's.
        clip: largest global norm of the gradient; ``None`` does not clip.
        decoder_norm: ``"free"``: norms are part of the loss; ``"unit"``: rows are kept at norm 1, and the part of the
            gradient along each row is removed.
        decoder_init_norm: norm of the decoder's rows at the start.
        b_dec_init: ``"zeros"``, or the ``"mean"`` or ``"geometric_median"`` of the first batch.
        normalize_activations: what happens to activations before they are encoded. ``"expected_average_only_in"`` gives
            them the mean norm ``sqrt(d_in)``, ``"covariance_whitening"`` mean zero and unit covariance; both are
            estimated before training and folded into the weights after it.
        n_batches_for_norm_estimate: batches that these two are estimated from, the first ones.
        precision: of matrix products: ``"highest"`` is float32 on every device; ``"default"`` is the device's own,
            bfloat16 passes on a TPU and TF32 on recent GPUs.
        seed: seed of the first parameters.
        tap: where the dictionary belongs; its ``reads`` and ``writes`` pick arrays from batches that are mappings.
        taps: the same for each source of a crosscoder.

    Raises:
        ConfigError: a field is out of range, or belongs to another architecture.

    >>> TrainingConfig(architecture="batchtopk", d_in=16, d_sae=64, k=4).architecture
    'batchtopk'
    """

    d_in: int
    d_sae: int
    architecture: TrainedArchitecture = "standard"
    d_out: int | None = None
    transcoder: bool = False
    skip: bool = False
    n_sources: int | None = None
    k: int | None = None
    matryoshka_widths: tuple[int, ...] = ()
    rescale_acts_by_decoder_norm: bool = True
    apply_b_dec_to_input: bool | None = None
    l1_coefficient: float | None = None
    l1_warm_up_steps: int = 0
    lp_norm: float = 1.0
    gated_stop_gradient: bool = False
    l0_coefficient: float | None = None
    l0_warm_up_steps: int = 0
    l0_target: float | None = None
    jumprelu_sparsity_loss: Literal["step", "tanh"] = "step"
    jumprelu_bandwidth: float = 0.05
    jumprelu_init_threshold: float = 0.01
    jumprelu_tanh_scale: float = 4.0
    jumprelu_ste_to_input: bool = False
    pre_act_loss_coefficient: float | None = None
    aux_loss_coefficient: float | None = None
    matryoshka_aux_loss: bool = False
    topk_threshold_lr: float = 0.01
    max_iterations: int | None = None
    residual_threshold: float = 0.01
    stop_on_duplicate_support: bool = True
    dead_feature_window: int = 1000
    feature_sampling_window: int = 2000
    lr: float = 3e-4
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    lr_end: float | None = None
    lr_warm_up_steps: int = 0
    lr_decay_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip: float | None = 1.0
    decoder_norm: Literal["free", "unit"] = "free"
    decoder_init_norm: float = 0.1
    b_dec_init: Literal["zeros", "mean", "geometric_median"] = "zeros"
    normalize_activations: NormalizeActivations = "none"
    n_batches_for_norm_estimate: int = 100
    precision: Literal["highest", "default"] = "highest"
    seed: int = 0
    tap: Tap = _NOWHERE
    taps: tuple[Tap, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        object.__setattr__(self, "matryoshka_widths", self._widths())
        self._check_ranges()
        self._check_architecture()
        self._check_form()

    def _widths(self) -> tuple[int, ...]:
        widths = tuple(self.matryoshka_widths)
        if not widths:
            return ()
        widths += (self.d_sae,) if widths[-1] != self.d_sae else ()
        if list(widths) != sorted(set(widths)) or widths[0] < 1 or len(widths) < 2:
            raise ConfigError(
                f"matryoshka_widths={self.matryoshka_widths} must be increasing numbers of features below "
                f"d_sae={self.d_sae}."
            )
        return widths

    def _check_ranges(self) -> None:
        for name in (
            "d_in", "d_sae", "d_out", "n_sources", "k", "max_iterations", "feature_sampling_window",
            "n_batches_for_norm_estimate",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        for name in (
            "dead_feature_window", "l1_warm_up_steps", "l0_warm_up_steps", "lr_warm_up_steps", "lr_decay_steps",
            "l1_coefficient", "l0_coefficient", "pre_act_loss_coefficient", "aux_loss_coefficient", "lr_end", "seed",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value} must be at least 0 and finite.")
        for name in ("lr", "clip", "lp_norm", "jumprelu_bandwidth", "decoder_init_norm", "adam_eps", "l0_target"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value} must be positive and finite.")
        for name in ("adam_beta1", "adam_beta2", "topk_threshold_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1.")
        for name in ("k", "l0_target"):
            if (value := getattr(self, name)) is not None and value > self.d_sae:
                raise ConfigError(f"{name}={value} is more than the d_sae={self.d_sae} features there are.")

    def _check_architecture(self) -> None:
        for name, (architectures, meaning) in _BELONGS.items():
            if getattr(self, name) not in (None, ()) and self.architecture not in architectures:
                raise ConfigError(
                    f'{name}={getattr(self, name)} is {meaning}; architecture="{self.architecture}" has none (it '
                    f"belongs to {', '.join(architectures)}). Leave it out, or change the architecture."
                )
        if self.architecture in TOP_K and self.k is None:
            raise ConfigError(f'architecture="{self.architecture}" needs k, how many features a token keeps.')
        if self.l0_target is not None and self.jumprelu_sparsity_loss != "step":
            raise ConfigError('l0_target counts features: it goes with jumprelu_sparsity_loss="step".')
        if self.lr_schedule == "linear" and self.lr_decay_steps:
            raise ConfigError('lr_schedule="linear" falls to zero by itself: leave out lr_decay_steps.')
        if self.architecture == "matching_pursuit" and self.normalize_activations == "covariance_whitening":
            raise ConfigError("Whitening cannot be folded into a matching_pursuit dictionary: its weights are tied.")

    def _check_form(self) -> None:
        if self.skip and not self.transcoder:
            raise ConfigError("skip=True is of transcoders: transcoder=True.")
        if self.transcoder and (self.apply_b_dec_to_input or self.n_sources):
            raise ConfigError(
                "A transcoder's b_dec belongs to its output and it has one source: leave out apply_b_dec_to_input and "
                "n_sources."
            )
        if not self.transcoder and self.d_out not in (None, self.d_in):
            raise ConfigError(f"d_out={self.d_out} differs from d_in={self.d_in}: transcoder=True.")
        estimated = ("none", "expected_average_only_in")
        if (self.transcoder or self.n_sources) and self.normalize_activations not in estimated:
            raise ConfigError(
                f"Transcoders and crosscoders are trained with normalize_activations in {estimated}, got "
                f'"{self.normalize_activations}".'
            )
        if self.normalize_activations == "constant_scalar_rescale":
            raise ConfigError('normalize_activations="constant_scalar_rescale" belongs to temporal dictionaries.')
        if self.n_sources:
            if self.architecture not in ("standard", "jumprelu", "topk", "batchtopk"):
                raise ConfigError(f"A crosscoder cannot be {self.architecture!r}.")
            if self.decoder_norm == "unit" or self.apply_b_dec_to_input:
                raise ConfigError('A crosscoder is trained with decoder_norm="free" and b_dec in its output alone.')
            if self.taps and len(self.taps) != self.n_sources:
                raise ConfigError(f"{len(self.taps)} taps were given for n_sources={self.n_sources}.")

    @property
    def subtracts_b_dec(self) -> bool:
        """Whether ``b_dec`` is subtracted before encoding."""
        default = not self.transcoder and self.n_sources is None
        return default if self.apply_b_dec_to_input is None else self.apply_b_dec_to_input

    @property
    def selects_by_norm(self) -> bool:
        """Whether features are selected by their value times the norm of their decoder row."""
        return self.architecture in TOP_K and self.rescale_acts_by_decoder_norm

    @property
    def width_in(self) -> int:
        """Length of the vector that is encoded: all sources together."""
        return self.d_in * (self.n_sources or 1)

    @property
    def width_out(self) -> int:
        """Length of the vector that is reconstructed."""
        return self.width_in if self.d_out is None else self.d_out

    def replace(self, **changes: Any) -> "TrainingConfig":
        """Returns a copy with ``changes`` applied and validated."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def of(cls, dictionary: Dictionary, **changes: Any) -> "TrainingConfig":
        """Returns settings whose training may start from a dictionary, with ``changes``.

        A dictionary that ``batchtopk`` left as ``jumprelu`` is trained further as such with
        ``architecture="batchtopk", k=...``.

        Args:
            dictionary: what ``start`` will be.
            changes: any fields, such as ``lr``.

        >>> from tljax.dictionaries.training import train_dictionary
        >>> import numpy as np
        >>> rows = np.random.default_rng(0).standard_normal((64, 8), np.float32)
        >>> cfg = TrainingConfig(architecture="batchtopk", d_in=8, d_sae=16, k=2)
        >>> trained = train_dictionary(cfg, rows, steps=2, batch_size=32).dictionary
        >>> TrainingConfig.of(trained, architecture="batchtopk", k=3).k
        3
        """
        theirs = dictionary.cfg
        fields: dict[str, Any] = {name: getattr(theirs, name) for name in ("architecture", "d_in", "d_sae", "tap")}
        fields |= {"transcoder": theirs.transcoder, "skip": "W_skip" in dictionary.params}
        fields |= {"d_out": theirs.d_out, "normalize_activations": theirs.normalize_activations}
        fields["apply_b_dec_to_input"] = None if theirs.transcoder else theirs.apply_b_dec_to_input
        selection = {"k": theirs.k, "rescale_acts_by_decoder_norm": theirs.rescale_acts_by_decoder_norm}
        fields |= selection if theirs.architecture in TOP_K else {}
        return cls(**(fields | changes))

    def dictionary_config(self) -> DictionaryConfig:
        """The config of the dictionary as it is while it is trained: ``batchtopk`` selects over the batch.

        Raises:
            ConfigError: this trains a crosscoder.
        """
        if self.n_sources:
            raise ConfigError("This trains a crosscoder: crosscoder_config().")
        pursuit = {
            name: getattr(self, name) for name in ("max_iterations", "residual_threshold", "stop_on_duplicate_support")
        }
        return DictionaryConfig(
            architecture=self.architecture, d_in=self.d_in, d_sae=self.d_sae, d_out=self.d_out, k=self.k,
            normalize_activations=self.normalize_activations, apply_b_dec_to_input=self.subtracts_b_dec,
            rescale_acts_by_decoder_norm=self.selects_by_norm, transcoder=self.transcoder,
            matryoshka_widths=self.matryoshka_widths, tap=self.tap,
            **(pursuit if self.architecture == "matching_pursuit" else {}),
        )  # fmt: skip

    def crosscoder_config(self) -> CrosscoderConfig:
        """The config of the crosscoder that is trained.

        Raises:
            ConfigError: this trains a dictionary.
        """
        if not self.n_sources:
            raise ConfigError("This trains a dictionary: dictionary_config().")
        return CrosscoderConfig(
            n_sources=self.n_sources, d_in=self.d_in, d_sae=self.d_sae, architecture=self.architecture, k=self.k,
            taps=self.taps,
        )  # fmt: skip
