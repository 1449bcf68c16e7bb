"""Steps of weight processing: which are exact for a config, why the others are not, and which were applied."""

import dataclasses
from typing import TypedDict

from tljax.config import HookedTransformerConfig
from tljax.errors import ConfigError


class ProcessingOptions(TypedDict, total=False):
    """The requested steps of weight processing, in the order of application: see :meth:`Steps.for_config`."""

    fold_ln: bool
    center_writing_weights: bool
    center_unembed: bool
    fold_value_biases: bool
    refactor_factored_attn_matrices: bool


STEPS = tuple(ProcessingOptions.__annotations__)
"""Names of the steps, in the order of application."""


def why_not(cfg: HookedTransformerConfig) -> dict[str, str]:
    """Returns the steps that would change what a model of this config computes, each with the reason."""
    value_biases = _why_not_value_biases(cfg)
    reasons = {
        "fold_ln": _why_not_fold_ln(cfg),
        "center_writing_weights": _why_not_center_writing(cfg),
        "center_unembed": "the soft cap on the logits does not commute with a shift of all of them"
        if cfg.output_logits_soft_cap > 0
        else None,
        "fold_value_biases": value_biases,
        "refactor_factored_attn_matrices": _why_not_refactor(cfg) or value_biases,
    }
    return {step: reason for step, reason in reasons.items() if reason is not None}


def _why_not_fold_ln(cfg: HookedTransformerConfig) -> str | None:
    norm = cfg.normalization_type
    if norm is None:
        return "there are no norms"
    if cfg.use_normalization_of_residual:
        return "what the norms put out is the residual stream itself, which stays"
    if norm.endswith("Pre"):
        return "the norms have no parameters"
    if cfg.positional_embedding_type == "shortformer":
        return "queries and keys read position embeddings after ln1, whose gain is not theirs"
    if norm == "LN" and cfg.num_experts is not None:
        return "the router and the experts' gates have no bias that could take the bias of ln2"
    if norm == "LN" and cfg.gated_mlp and not cfg.gated_mlp_bias:
        return "the MLP's gate has no bias that could take the bias of ln2"
    return None


def _why_not_center_writing(cfg: HookedTransformerConfig) -> str | None:
    if cfg.positional_embedding_type == "shortformer":
        return "queries and keys read position embeddings without a norm, their mean included"
    if cfg.d_embed is not None:
        return "a projection comes between the embedding and the residual stream"
    if cfg.normalization_type not in ("LN", "LNPre"):
        return "only layer norms subtract the mean of the residual stream, and these are not layer norms"
    if cfg.use_normalization_of_residual:
        return "attention and MLP read the residual stream as it is, its mean included"
    if cfg.final_rms:
        return "the final norm is an RMS norm, which does not subtract the mean of the residual stream"
    if cfg.has_norms_after:
        return "norms come between the weights and the residual stream"
    return None


def _why_not_value_biases(cfg: HookedTransformerConfig) -> str | None:
    if cfg.kv_lora_rank is not None:
        return "latent attention has no value biases"
    if cfg.use_attention_sinks:
        return "attention sinks take some of the weight, so the patterns that carry the value biases do not sum to one"
    if cfg.clip_qkv is not None:
        return "values are clipped after their bias is added"
    return None


def _why_not_refactor(cfg: HookedTransformerConfig) -> str | None:
    if cfg.positional_embedding_type == "rotary":
        return "queries and keys are rotated between W_Q and W_K, so only their product without rotation could be kept"
    if cfg.use_qk_norm:
        return "queries and keys are normalised between W_Q and W_K"
    if cfg.kv_heads != cfg.n_heads:
        return "several query heads share one W_K and W_V, and each would need its own"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """The processing that applies to one config; hashable, so that it can be a static argument.

    Attributes:
        fold_ln: fold the norms.
        center_writing_weights: centre what writes to the residual stream.
        center_unembed: centre the unembedding over the vocabulary.
        fold_value_biases: move ``b_V`` into ``b_O``.
        refactor_factored_attn_matrices: factor each head's ``W_Q W_K^T`` and ``W_V W_O`` anew.
        offset: the norms to fold multiply by ``1 + w``.
    """

    fold_ln: bool = False
    center_writing_weights: bool = False
    center_unembed: bool = False
    fold_value_biases: bool = False
    refactor_factored_attn_matrices: bool = False
    offset: bool = False

    @classmethod
    def for_config(
        cls,
        cfg: HookedTransformerConfig,
        *,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> "Steps":
        """Returns the requested steps that are exact for ``cfg``.

        Args:
            cfg: the config of unprocessed parameters.
            fold_ln: fold norms into the matrices that read them (``LN`` to ``LNPre``, ``RMS`` to ``RMSPre``).
            center_writing_weights: centre everything that writes to the residual stream.
            center_unembed: centre the unembedding over the vocabulary.
            fold_value_biases: move value biases into the output bias.
            refactor_factored_attn_matrices: factor each head's query-key and output-value matrices anew.

        Raises:
            ConfigError: ``refactor_factored_attn_matrices``, which is off unless asked for, would not be exact.
        """
        reasons = why_not(cfg)
        refactor = "refactor_factored_attn_matrices"
        if refactor_factored_attn_matrices and refactor in reasons:
            raise ConfigError(f"{refactor} would change what this model computes: {reasons[refactor]}. Leave it off.")
        folds = fold_ln and "fold_ln" not in reasons
        return cls(
            fold_ln=folds,
            offset=folds and cfg.rmsnorm_uses_offset,
            center_writing_weights=center_writing_weights and "center_writing_weights" not in reasons,
            center_unembed=center_unembed and "center_unembed" not in reasons,
            fold_value_biases=(fold_value_biases or refactor_factored_attn_matrices)
            and "fold_value_biases" not in reasons,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )

    def config_after(self, cfg: HookedTransformerConfig) -> HookedTransformerConfig:
        """Returns ``cfg`` as it is once the steps have run."""
        applied = tuple(step for step in STEPS if getattr(self, step) or step in cfg.weight_processing)
        if self.fold_ln:
            cfg = cfg.replace(normalization_type=f"{cfg.normalization_type}Pre")
        return cfg if applied == cfg.weight_processing else cfg.replace(weight_processing=applied)

    def __bool__(self) -> bool:
        return self != Steps()


def processing_report(cfg: HookedTransformerConfig) -> dict[str, str]:
    """Reports for each step whether it was applied to the weights of ``cfg`` and, if not, whether it could be.

    Returns:
        Step → ``"applied"``, ``"not applied"`` (it was not asked for), or ``"not exact here: ..."`` with the reason.
    """
    reasons = why_not(cfg)

    def state(step: str) -> str:
        if step in cfg.weight_processing:
            return "applied"
        return f"not exact here: {reasons[step]}" if step in reasons else "not applied"

    return {step: state(step) for step in STEPS}
