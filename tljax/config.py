"""``HookedTransformerConfig``: the config of a decoder-only transformer, with TransformerLens's field names."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from tljax.config_checks import ACTIVATIONS as ACTIVATIONS
from tljax.config_checks import check, checked_fields, checked_sizes
from tljax.config_derived import DERIVED, FITTED_TO_ROTARY_DIM, derived_fields
from tljax.elsewhere import CONFIG, SaysWhatInstead
from tljax.errors import ConfigError, nearest
from tljax.splice import Splice

BOOKKEEPING = (
    "init_mode", "initializer_range", "init_weights", "seed", "tokenizer_name", "tokenizer_prepends_bos",
    "default_prepend_bos", "eos_token_ids", "bos_token_id", "pad_token_id", "weight_processing", "model_name",
    "original_architecture", "use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in",
    "use_hook_tokens",
)  # fmt: skip
"""Fields that no compiled program depends on: names, initialisation, special tokens, contents of a full cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Kind of a layer: the ways in which layers of one model may differ. Layers of one kind share compiled programs.

    Attributes:
        local: attention sees only the last ``window_size`` keys.
        rotates: queries and keys are rotated (in a model with rotary positions).
        experts: a mixture of experts stands in place of the MLP.
        splices: the dictionaries spliced into the layer, with points named relative to it.
    """

    local: bool = False
    rotates: bool = True
    experts: bool = False
    splices: tuple[Splice, ...] = ()


USUAL = LayerKind()
"""The most common kind: global attention with rotation, and an MLP."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HookedTransformerConfig(SaysWhatInstead):
    """The shape and the arithmetic of a decoder-only transformer.

    Field names, defaults and meanings are TransformerLens 3.9's. The object is frozen and hashable: it is the static
    part of every compiled program. Use :meth:`replace` for a changed copy.

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_ctx: longest sequence the model takes, in tokens.
        d_head: width of one attention head.
        n_heads: query heads; ``-1`` means ``d_model // d_head``.
        n_key_value_heads: key/value heads for grouped or multi-query attention; ``None`` means ``n_heads``.
        d_value: width of a head's values, if not that of its queries and keys; ``None`` means ``d_head``.
        kv_lora_rank: keys and values come from a latent of this width (multi-head latent attention, DeepSeek 2);
            ``W_K`` and ``W_V`` are replaced by their factors. The last ``rotary_dim`` dimensions of a head rotate
            (DeepSeek's ``qk_rope_head_dim``); in keys they are the same for all heads. ``None``: no latent.
        q_lora_rank: width of a separate latent that queries come from; ``None``: no latent.
        latent_norm_eps: ``eps`` of the latents' RMS norms.
        d_mlp: width of the MLP; ``None`` means ``4 * d_model``.
        d_vocab: number of token ids; ``-1`` means "take it from the tokenizer".
        d_vocab_out: number of output logits; ``-1`` means ``d_vocab``.
        act_fn: the MLP's activation, one of ``ACTIVATIONS``; ``"xielu"`` has parameters, ``mlp.act`` (Apertus).
        gated_mlp: ``act(x W_gate) * (x W_in)`` instead of ``act(x W_in)``; ``b_in`` is added to the product.
        gated_mlp_bias: both branches have biases of their own, added before the product (Granite code):
            ``act(x W_gate + b_gate) * (x W_in + b_in)``.
        num_experts: number of experts in a mixture that replaces the MLP; ``None``: no mixture.
        experts_per_token: how many experts each token is sent to.
        d_expert: width of one expert; ``None`` means ``d_mlp``.
        moe_layers: for each layer, whether it has experts rather than an MLP; ``None`` means all do.
        router: how the router's scores give a choice of experts and their weights. ``"softmax"``: a softmax over all
            experts, then the largest (Mixtral); ``"chosen_softmax"``: the largest scores, then a softmax over them
            (Granite); ``"sparsemixer"``: two experts, one after the other, each weighed by a softmax over the experts
            whose score is close (Phi-3.5-MoE); ``"sigmoid"``: a sigmoid of each score, plus a learned bias that
            affects only the choice (DeepSeek 3).
        norm_topk_prob: under ``"softmax"`` and ``"sigmoid"``, the chosen experts' weights are divided by their sum.
        router_jitter: under ``"sparsemixer"``, scores within twice this share of the largest are close.
        routed_scaling_factor: multiplies the weights of chosen experts.
        expert_groups: number of equal groups of experts; a token's experts come from its best
            ``expert_groups_per_token`` groups (DeepSeek). A group's score is that of its best expert, or under
            ``"sigmoid"`` the sum of its best two. ``None``: no groups.
        d_shared_expert: width of one more expert, which every token goes through; ``None``: there is none.
        gate_shared_expert: multiplies the shared expert's output by the sigmoid of one more projection (Qwen 2).
        expert_biases: experts and router have biases (gpt-oss).
        swiglu_limit: in a gated expert, upper limit of the activation's input, and limit of the linear branch on both
            sides; one is then added to the linear branch (gpt-oss).
        attn_only: blocks without an MLP.
        parallel_attn_mlp: attention and MLP both read ``resid_pre`` (GPT-NeoX).
        normalization_type: ``"LN"``, ``"RMS"``, their folded forms ``"LNPre"``, ``"RMSPre"``, or ``None``.
        final_rms: the final norm is an RMS norm even when the others are layer norms.
        use_normalization_before_and_after: the outputs of attention and MLP are normalised too, before they are added
            to the residual stream (Gemma 2); these norms are not folded.
        use_normalization_after_only: only the outputs of attention and MLP are normalised (OLMo 2), not their inputs.
            The norms are ``ln1_post`` and ``ln2_post``; TransformerLens calls them ``ln1`` and ``ln2``.
        use_normalization_of_residual: the norms are on the residual stream itself, after each addition (GPT-1):
            ``resid_mid = ln1(resid_pre + attn_out)``, ``resid_post = ln2(resid_mid + mlp_out)``. Attention and MLP read
            the stream as it is, and there is no final norm.
        rmsnorm_uses_offset: norms multiply by ``1 + w`` (Gemma, Nemotron).
        embedding_multiplier: multiplies the token embedding (Gemma, Granite); ``hook_embed`` comes after it.
        residual_multiplier: multiplies what attention and MLP add to the residual stream, before ``hook_attn_out`` and
            ``hook_mlp_out`` (Granite).
        logits_multiplier: multiplies the logits, after ``unembed.hook_out`` and before any soft cap.
        eps: added to the mean square inside the root of every norm.
        positional_embedding_type: ``"standard"`` (learned, added to the residual stream), ``"shortformer"`` (learned,
            added after ``ln1`` to the input of queries and keys, in every layer, never to the residual stream),
            ``"rotary"``, ``"alibi"`` or ``"none"``.
        alibi_bias_max: under ``"alibi"``, the last of ``H`` heads has slope ``2 ** -alibi_bias_max``.
        alibi_rounded: ALiBi as in Falcon-RW: adds ``slope * key`` to the scores, with both factors and the product
            rounded to bfloat16 and the product divided by ``attn_scale``.
        d_embed: width of token embedding and unembedding, if projections ``embed.W_proj`` and ``unembed.W_proj``
            connect them to the residual stream (OPT-350m); ``None``: no projections.
        post_embedding_ln: a layer norm on the token embedding, before ``hook_embed`` (Bloom); not folded.
        rotary_dim: leading dimensions of a head that rotate; ``None`` means all of ``d_head``.
        rotary_base: base of the rotary frequencies.
        rotary_scaling_factor: linear position scaling (positions are divided by it).
        rotary_base_local: base in layers of local attention, to which position scaling then does not apply (Gemma 3);
            ``None`` means ``rotary_base``.
        rotary_layers: for each layer, whether it rotates at all; ``None`` means all do (in SmolLM3 some do not).
        rotary_adjacent_pairs: rotate dimensions ``(0,1),(2,3),…`` (GPT-J) instead of first half with second half.
        use_NTK_by_parts_rope: Llama-3 frequency scaling, with the four ``NTK_*`` fields below it.
        use_yarn_rope: YaRN frequency scaling, with the ``yarn_*`` fields below it. ``yarn_attention_factor`` multiplies
            cosines and sines; ``yarn_global_attn_only``: layers of local attention rotate unscaled (OLMo 3).
        longrope_short_factor, longrope_long_factor: divisors of the frequency of each rotated pair (Phi-3's long rope):
            the short ones for a text of up to ``longrope_original_max_position_embeddings`` tokens, the long ones for
            all of a longer text; ``longrope_attention_factor`` multiplies cosines and sines of both. ``None``: no long
            rope.
        use_dynamic_ntk_rope: frequencies change in texts of more than ``train_seq_length`` tokens. ``n_ctx`` may not
            exceed that, so they never change here; ``dynamic_ntk_factor`` is kept for export.
        use_qk_norm: a norm over queries and keys, before rotation (Qwen 3).
        qk_norm_type: ``"RMS"`` or ``"LN"``.
        qk_norm_span: ``"shared"``: over each head, one weight for all heads; ``"per_head"``: over each head, a weight
            for each (Cohere); ``"joint"``: over all heads together (OLMo 2).
        qk_norm_after_rotary: the norm of queries and keys comes after rotation (HunYuan).
        clip_qkv: queries, keys and values are clipped to ``[-clip_qkv, clip_qkv]`` after ``hook_q``, ``hook_k``,
            ``hook_v`` and their norm, before rotation (OLMo, MPT); ``None``: not at all.
        use_attention_sinks: each head has a learned score that takes attention and gives no value (gpt-oss).
        use_attn_scale: divide scores by ``attn_scale``; off means divide by one.
        attn_scale: the divisor; ``-1`` means ``sqrt(d_head)``.
        scale_attn_by_inverse_layer_idx: additionally divide layer ``l``'s scores by ``l + 1``.
        attn_scores_soft_cap: ``cap * tanh(scores / cap)`` when positive.
        output_logits_soft_cap: the same on the logits.
        attention_dir: ``"causal"`` or ``"bidirectional"``.
        use_local_attn: some layers attend only to the last ``window_size`` keys.
        window_size: keys ``k > q - window_size`` are visible to a local layer.
        attn_types: ``"global"`` or ``"local"`` for each layer.
        use_attn_result, use_split_qkv_input, use_attn_in, use_hook_mlp_in, use_hook_tokens: put the optional hook
            point into full caches. Naming an optional point in a hook or filter needs no switch.
        dtype: dtype of parameters and activations, as a name.
        attention_path: how attention runs where nothing names its scores or pattern: ``"materialised"``, the whole
            matrix; ``"blockwise"``, some queries at a time; ``"cudnn"`` and ``"splash"``, jax's kernels on NVIDIA GPUs
            and TPUs; ``"auto"``, by the length of the text and the device
            (:meth:`~tljax.HookedTransformer.attention_path`). The numbers are the same but for rounding.
        attention_block: most queries of a block, for all heads that share a key.
        matmul_precision: ``"highest"`` (float32 means float32), ``"high"`` or ``"default"`` (the backend's fastest).
        init_mode, initializer_range, seed, init_weights: how ``HookedTransformer(cfg)`` draws its parameters.
        tokenizer_name: a tokenizer to load with the model.
        default_prepend_bos: whether text gets a BOS token unless a call says otherwise.
        eos_token_ids: tokens that end a generated text, from a checkpoint's generation_config.json or config.json;
            ``None`` means the tokenizer's EOS. One id may be given as a number. Ids outside the vocabulary are kept
            and have no effect.
        bos_token_id, pad_token_id: the ids in the same file, or ``None``. ``pad_token_id`` fills generated texts after
            their end; encoding text uses the tokenizer's own tokens.
        tokenizer_prepends_bos: whether the tokenizer adds BOS by itself (set when a tokenizer is attached).
        weight_processing: which steps of weight processing the parameters went through.
        model_name, original_architecture: where the parameters came from.
        splices: the dictionaries spliced into the model (:meth:`~tljax.HookedTransformer.with_dictionaries`); their
            arrays are among the parameters.
    """

    d_model: int
    n_layers: int
    n_ctx: int
    d_head: int = -1
    n_heads: int = -1
    n_key_value_heads: int | None = None
    d_value: int | None = None
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    latent_norm_eps: float = 1e-6
    d_mlp: int | None = None
    d_vocab: int = -1
    d_vocab_out: int = -1
    act_fn: str | None = "relu"
    gated_mlp: bool = False
    gated_mlp_bias: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    d_expert: int | None = None
    moe_layers: tuple[bool, ...] | None = None
    router: Literal["softmax", "chosen_softmax", "sparsemixer", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    router_jitter: float = 0.01
    routed_scaling_factor: float = 1.0
    expert_groups: int | None = None
    expert_groups_per_token: int | None = None
    d_shared_expert: int | None = None
    gate_shared_expert: bool = False
    expert_biases: bool = False
    swiglu_limit: float | None = None
    attn_only: bool = False
    parallel_attn_mlp: bool = False
    normalization_type: Literal["LN", "LNPre", "RMS", "RMSPre"] | None = "LN"
    final_rms: bool = False
    use_normalization_before_and_after: bool = False
    use_normalization_after_only: bool = False
    use_normalization_of_residual: bool = False
    rmsnorm_uses_offset: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    eps: float = 1e-5
    positional_embedding_type: Literal["standard", "shortformer", "rotary", "alibi", "none"] = "standard"
    alibi_bias_max: float = 8.0
    alibi_rounded: bool = False
    post_embedding_ln: bool = False
    d_embed: int | None = None
    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    rotary_scaling_factor: float = 1.0
    rotary_base_local: float | None = None
    rotary_layers: tuple[bool, ...] | None = None
    rotary_adjacent_pairs: bool = False
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_by_parts_factor: float = 8.0
    NTK_original_ctx_len: int = 8192
    use_yarn_rope: bool = False
    yarn_factor: float = 1.0
    yarn_attention_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_truncate: bool = True
    yarn_global_attn_only: bool = False
    longrope_short_factor: tuple[float, ...] | None = None
    longrope_long_factor: tuple[float, ...] | None = None
    longrope_attention_factor: float = 1.0
    longrope_original_max_position_embeddings: int = 4096
    use_dynamic_ntk_rope: bool = False
    dynamic_ntk_factor: float = 1.0
    train_seq_length: int | None = None
    use_qk_norm: bool = False
    qk_norm_type: Literal["RMS", "LN"] = "RMS"
    qk_norm_span: Literal["shared", "per_head", "joint"] = "shared"
    qk_norm_after_rotary: bool = False
    clip_qkv: float | None = None
    use_attention_sinks: bool = False
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    scale_attn_by_inverse_layer_idx: bool = False
    attn_scores_soft_cap: float = -1.0
    output_logits_soft_cap: float = -1.0
    attention_dir: Literal["causal", "bidirectional"] = "causal"
    use_local_attn: bool = False
    window_size: int | None = None
    attn_types: tuple[str, ...] | None = None
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    use_hook_tokens: bool = False
    dtype: str = "float32"
    matmul_precision: Literal["highest", "high", "default"] = "highest"
    attention_path: Literal["auto", "materialised", "blockwise", "cudnn", "splash"] = "auto"
    attention_block: int = 256
    init_mode: str = "gpt2"
    initializer_range: float = -1.0
    init_weights: bool = True
    seed: int | None = None
    tokenizer_name: str | None = None
    tokenizer_prepends_bos: bool | None = None
    default_prepend_bos: bool = True
    eos_token_ids: tuple[int, ...] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    weight_processing: tuple[str, ...] = ()
    model_name: str = "custom"
    original_architecture: str | None = None
    splices: tuple[Splice, ...] = ()
    _instead = CONFIG

    def __post_init__(self) -> None:
        for step in (checked_sizes, checked_fields, derived_fields):
            for name, value in step(self).items():
                object.__setattr__(self, name, value)
        check(self)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # every dispatch of a compiled block hashes its config: do it once
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    @property
    def has_norms_before(self) -> bool:
        """Whether attention and MLP read the residual stream through a norm."""
        elsewhere = self.use_normalization_after_only or self.use_normalization_of_residual
        return self.normalization_type is not None and not elsewhere

    @property
    def learns_positions(self) -> bool:
        """Whether there is a table of learned positions, ``W_pos``."""
        return self.positional_embedding_type in ("standard", "shortformer")

    @property
    def has_resid_mid(self) -> bool:
        """Whether there is a residual stream between attention and MLP."""
        return not (self.attn_only or self.parallel_attn_mlp)

    @property
    def has_final_norm(self) -> bool:
        """Whether the final residual stream is unembedded through a norm."""
        return self.normalization_type is not None and not self.use_normalization_of_residual

    @property
    def has_norms_after(self) -> bool:
        """Whether the outputs of attention and MLP go through a norm."""
        return self.use_normalization_before_and_after or self.use_normalization_after_only

    @property
    def uses_longrope(self) -> bool:
        """Whether the rotary frequencies of a text depend on its length."""
        return self.longrope_short_factor is not None or self.longrope_long_factor is not None

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads: ``n_key_value_heads``, or ``n_heads`` without grouping."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    @property
    def value_width(self) -> int:
        """Width of the values of a head: ``d_value``, or ``d_head`` where that is not set."""
        return self.d_head if self.d_value is None else self.d_value

    @property
    def jnp_dtype(self) -> jnp.dtype:
        """``dtype`` as a jax dtype."""
        return jnp.dtype(self.dtype)

    @property
    def n_params(self) -> int:
        """Number of hidden weights (attention and MLP matrices), as TransformerLens counts: no embeddings, no biases.

        Grouped key/value heads are counted as stored.
        """
        from tljax.modules.stack import block_weights  # the modules declare their parameters, and import this file

        return sum(block_weights(self, kind).stored for kind in self.layer_kinds)

    def layer_kind(self, layer: int) -> LayerKind:
        """Returns the kind of a layer: what distinguishes it from other layers of this model."""
        local = self.use_local_attn and self.attn_types is not None and self.attn_types[layer] == "local"
        rotates = self.rotary_layers is None or self.rotary_layers[layer]
        experts = self.num_experts is not None and (self.moe_layers is None or self.moe_layers[layer])
        splices = tuple(splice.within_block for splice in self.splices if splice.layer == layer)
        return LayerKind(local=local, rotates=rotates, experts=experts, splices=splices)

    @functools.cached_property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return tuple(map(self.layer_kind, range(self.n_layers)))

    @functools.cached_property
    def computation(self) -> "HookedTransformerConfig":
        """The config that programs are compiled for: this one, with the fields of ``BOOKKEEPING`` at their defaults.

        Models that compute the same share their programs, whatever they are called and wherever they come from.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in BOOKKEEPING}
        splices = tuple(splice.computation for splice in self.splices)
        return _one_of_equals(dataclasses.replace(self, **defaults, splices=splices))

    @functools.cached_property
    def embedding_splices(self) -> tuple[Splice, ...]:
        """The dictionaries spliced in before the first block."""
        return tuple(splice.computation for splice in self.splices if splice.layer is None)

    @functools.cached_property
    def without_splices(self) -> "HookedTransformerConfig":
        """The config of the same model with no dictionary spliced in."""
        return _one_of_equals(dataclasses.replace(self, splices=())) if self.splices else self

    def replace(self, **changes: Any) -> "HookedTransformerConfig":
        """Returns a copy with ``changes`` applied and validated.

        Fields at their derived value (``d_mlp`` at ``4 * d_model``, ``attn_scale`` at ``sqrt(d_head)`` …) follow.
        """
        self.refuse_unknown(changes)
        fitted: dict[str, Any] = dict.fromkeys(FITTED_TO_ROTARY_DIM)
        derived = dataclasses.replace(self, **DERIVED, **fitted)
        follow = {
            name: unset
            for name, unset in DERIVED.items()
            if name not in changes and getattr(self, name) == getattr(derived, name)
        }
        return dataclasses.replace(self, **(follow | changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain, JSON-ready values; :meth:`from_dict` reads them back."""
        fields = {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }
        return fields | {"splices": [splice.to_dict() for splice in self.splices]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "HookedTransformerConfig":
        """Builds a config from a mapping.

        Raises:
            ConfigError: a key is not a field (names the nearest one), or a value does not validate.
        """
        cls.refuse_unknown(fields)
        return cls(**fields)

    @classmethod
    def unwrap(cls, cfg: "HookedTransformerConfig | Mapping[str, Any]") -> "HookedTransformerConfig":
        """Returns ``cfg`` itself, or the config a mapping describes."""
        if isinstance(cfg, HookedTransformerConfig):
            return cfg
        if isinstance(cfg, Mapping):
            return cls.from_dict(cfg)
        raise ConfigError(
            f"Expected a HookedTransformerConfig or a dict, got {type(cfg).__name__}. "
            "To load a model by name use HookedTransformer.from_pretrained(name)."
        )

    @classmethod
    def refuse_unknown(cls, fields: Iterable[str]) -> None:
        """Raises ConfigError if a name is not a config field."""
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [f"{key!r} is not a config field.{nearest(key, names)}" for key in fields if key not in names]
        if unknown:
            raise ConfigError(" ".join(unknown))


@functools.lru_cache(maxsize=256)
def _one_of_equals(cfg: HookedTransformerConfig) -> HookedTransformerConfig:
    """Returns the first config that equals this one, so that caches find it by identity, without comparing fields."""
    return cfg
