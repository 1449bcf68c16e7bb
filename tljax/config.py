"""``HookedTransformerConfig``: what a decoder is made of, with TransformerLens's field names."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import ConfigError, nearest

ACTIVATIONS = (
    "relu",
    "relu2",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "silu",
    "solu",
    "solu_ln",
)
NORMALIZATIONS = ("LN", "LNPre", "RMS", "RMSPre", None)
POSITIONAL_EMBEDDINGS = ("standard", "rotary", "none")
INIT_MODES = (
    "gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP",
)  # fmt: skip
DTYPES = {
    "float32": "float32", "fp32": "float32", "float16": "float16", "fp16": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16", "float64": "float64",
}  # fmt: skip
_SIZES = (
    "d_model", "n_layers", "n_ctx", "d_head", "n_heads", "n_key_value_heads", "d_mlp", "d_vocab", "d_vocab_out",
    "rotary_dim", "window_size",
)  # fmt: skip
_DERIVED: dict[str, Any] = {
    "d_mlp": None, "d_vocab_out": -1, "rotary_dim": None, "attn_scale": -1.0, "initializer_range": -1.0,
}  # fmt: skip
PRECISIONS = ("highest", "high", "default")


def canonical_dtype(dtype: Any) -> str:
    """Returns the canonical name of a floating dtype given as a name, a numpy or jax dtype, or a torch one.

    >>> canonical_dtype("bf16"), canonical_dtype(jnp.float32)
    ('bfloat16', 'float32')
    """
    if isinstance(dtype, str):
        name = dtype
    elif str(dtype).startswith("torch."):
        name = str(dtype).removeprefix("torch.")
    else:
        name = "None" if dtype is None else np.dtype(dtype).name
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.{nearest(name, DTYPES)}")
    return DTYPES[name]


def available_dtype(dtype: Any) -> str:
    """:func:`canonical_dtype`, refusing float64 while jax would silently make it float32."""
    name = canonical_dtype(dtype)
    if name == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError("dtype float64 needs jax.config.update('jax_enable_x64', True) first.")
    return name


@dataclasses.dataclass(frozen=True, kw_only=True)
class HookedTransformerConfig:
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
        d_mlp: width of the MLP; ``None`` means ``4 * d_model``.
        d_vocab: number of token ids; ``-1`` means "take it from the tokenizer".
        d_vocab_out: number of output logits; ``-1`` means ``d_vocab``.
        act_fn: the MLP's activation, one of ``ACTIVATIONS``.
        gated_mlp: ``act(x W_gate) * (x W_in)`` instead of ``act(x W_in)``.
        attn_only: blocks without an MLP.
        parallel_attn_mlp: attention and MLP both read ``resid_pre`` (GPT-NeoX).
        normalization_type: ``"LN"``, ``"RMS"``, their folded forms ``"LNPre"``, ``"RMSPre"``, or ``None``.
        final_rms: the final norm is an RMS norm even when the others are layer norms.
        use_normalization_before_and_after: norms on what attention and MLP put out too, before it is added to the
            residual stream (Gemma 2); they are not folded.
        rmsnorm_uses_offset: an RMS norm multiplies by ``1 + w`` (Gemma).
        embedding_multiplier: multiplies the token embedding (Gemma, Granite); ``hook_embed`` comes after it.
        residual_multiplier: multiplies what attention and MLP add to the residual stream, before ``hook_attn_out`` and
            ``hook_mlp_out`` (Granite).
        logits_multiplier: multiplies the logits, after ``unembed.hook_out`` and before any soft cap.
        eps: added to the mean square inside the root of every norm.
        positional_embedding_type: ``"standard"`` (learned), ``"rotary"`` or ``"none"``.
        rotary_dim: leading dimensions of a head that rotate; ``None`` means all of ``d_head``.
        rotary_base: base of the rotary frequencies.
        rotary_scaling_factor: linear position scaling (positions are divided by it).
        rotary_base_local: base in layers of local attention; ``None`` means ``rotary_base``. Position scaling then does
            not apply there (Gemma 3).
        rotary_layers: for each layer, whether it rotates at all; ``None`` means all do (in SmolLM3 some do not).
        rotary_adjacent_pairs: rotate dimensions ``(0,1),(2,3),…`` (GPT-J) instead of first half with second half.
        use_NTK_by_parts_rope: Llama-3 frequency scaling, with the four ``NTK_*`` fields below it.
        use_qk_norm: an RMS norm over each head's queries and keys, before rotation (Qwen 3).
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
        matmul_precision: ``"highest"`` (float32 means float32), ``"high"`` or ``"default"`` (the backend's fastest).
        init_mode, initializer_range, seed, init_weights: how ``HookedTransformer(cfg)`` draws its parameters.
        tokenizer_name: a tokenizer to load with the model.
        default_prepend_bos: whether text gets a BOS token unless a call says otherwise.
        tokenizer_prepends_bos: whether the tokenizer adds BOS by itself (set when a tokenizer is attached).
        model_name, original_architecture: where the parameters came from.
    """

    d_model: int
    n_layers: int
    n_ctx: int
    d_head: int = -1
    n_heads: int = -1
    n_key_value_heads: int | None = None
    d_mlp: int | None = None
    d_vocab: int = -1
    d_vocab_out: int = -1
    act_fn: str | None = "relu"
    gated_mlp: bool = False
    attn_only: bool = False
    parallel_attn_mlp: bool = False
    normalization_type: Literal["LN", "LNPre", "RMS", "RMSPre"] | None = "LN"
    final_rms: bool = False
    use_normalization_before_and_after: bool = False
    rmsnorm_uses_offset: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    eps: float = 1e-5
    positional_embedding_type: Literal["standard", "rotary", "none"] = "standard"
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
    use_qk_norm: bool = False
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
    init_mode: str = "gpt2"
    initializer_range: float = -1.0
    init_weights: bool = True
    seed: int | None = None
    tokenizer_name: str | None = None
    tokenizer_prepends_bos: bool | None = None
    default_prepend_bos: bool = True
    model_name: str = "custom"
    original_architecture: str | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        self._fill_derived()
        self._check_choices()
        self._check_combinations()

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # every dispatch of a compiled block hashes its config: do it once
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _fill_derived(self) -> None:
        if self.d_head == -1 and self.n_heads == -1:
            raise ConfigError("Give d_head or n_heads: neither was set, so the heads have no size.")
        if self.d_head == -1:
            if self.d_model % self.n_heads:
                raise ConfigError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}. Give d_head.")
            self._set("d_head", self.d_model // self.n_heads)
        if self.n_heads == -1:
            if self.d_model % self.d_head:
                raise ConfigError(f"d_model={self.d_model} is not a multiple of d_head={self.d_head}. Give n_heads.")
            self._set("n_heads", self.d_model // self.d_head)
        if self.d_mlp is None and not self.attn_only:
            self._set("d_mlp", 4 * self.d_model)
        if self.d_vocab_out == -1:
            self._set("d_vocab_out", self.d_vocab)
        if self.rotary_dim is None and self.positional_embedding_type == "rotary":
            self._set("rotary_dim", self.d_head)
        if not self.use_attn_scale:
            self._set("attn_scale", 1.0)
        elif self.attn_scale == -1.0:
            self._set("attn_scale", float(np.sqrt(self.d_head)))
        if self.initializer_range < 0:
            self._set("initializer_range", 0.8 / float(np.sqrt(self.d_model)) if self.init_mode == "gpt2" else 1.0)
        for name in ("attn_types", "rotary_layers"):
            if getattr(self, name) is not None:
                self._set(name, tuple(getattr(self, name)))
        self._set("dtype", canonical_dtype(self.dtype))

    def _check_sizes(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if value is None or (value == -1 and name in ("d_head", "n_heads", "d_vocab", "d_vocab_out")):
                continue
            smallest = 0 if name == "n_layers" else 1
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
                raise ConfigError(f"{name} must be an integer of at least {smallest}, got {value!r}.")
            self._set(name, int(value))
        for name in ("eps", "embedding_multiplier", "residual_multiplier", "logits_multiplier"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")

    def _check_choices(self) -> None:
        choices = {
            "normalization_type": NORMALIZATIONS,
            "positional_embedding_type": POSITIONAL_EMBEDDINGS,
            "attention_dir": ("causal", "bidirectional"),
            "init_mode": INIT_MODES,
            "matmul_precision": PRECISIONS,
        }
        if not self.attn_only:
            choices["act_fn"] = ACTIVATIONS
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                known = [option for option in allowed if option is not None]
                raise ConfigError(f"{name}={value!r} is not one of {known}.{nearest(str(value), known)}")

    def _check_combinations(self) -> None:
        if self.n_heads % self.kv_heads:
            raise ConfigError(
                f"n_heads={self.n_heads} is not a multiple of n_key_value_heads={self.n_key_value_heads}: "
                "each key/value head serves a whole group of query heads."
            )
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.d_head):
            raise ConfigError(f"rotary_dim={self.rotary_dim} must be even and at most d_head={self.d_head}.")
        if self.use_local_attn and (self.window_size is None or self.attn_types is None):
            raise ConfigError("use_local_attn needs window_size and attn_types ('global' or 'local' for each layer).")
        for name in ("attn_types", "rotary_layers"):
            value = getattr(self, name)
            if value is not None and len(value) != self.n_layers:
                raise ConfigError(f"{name} has {len(value)} entries for n_layers={self.n_layers}.")
        rotates = self.positional_embedding_type == "rotary"
        if not rotates and (self.rotary_layers is not None or self.rotary_base_local is not None or self.use_qk_norm):
            raise ConfigError(
                "rotary_layers, rotary_base_local and use_qk_norm need positional_embedding_type='rotary', got "
                f"{self.positional_embedding_type!r}."
            )
        if self.attn_types is not None and set(self.attn_types) - {"global", "local"}:
            raise ConfigError(f"attn_types may hold 'global' and 'local', got {sorted(set(self.attn_types))}.")
        if self.gated_mlp and self.act_fn is not None and self.act_fn.endswith("_ln"):
            raise ConfigError(f"act_fn={self.act_fn!r} normalises inside the MLP and has no gated form.")
        if self.attn_only and self.parallel_attn_mlp:
            raise ConfigError("attn_only has no MLP to run in parallel: set one of attn_only, parallel_attn_mlp.")
        if self.attn_only and self.use_hook_mlp_in:
            raise ConfigError("use_hook_mlp_in: an attention-only model has no MLP input.")
        if self.use_normalization_before_and_after and self.normalization_type is None:
            raise ConfigError("use_normalization_before_and_after needs a normalization_type, got None.")
        if self.use_attn_in and self.kv_heads != self.n_heads:
            raise ConfigError("use_attn_in needs as many key/value as query heads; use use_split_qkv_input.")

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads: ``n_key_value_heads``, or ``n_heads`` without grouping."""
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    @property
    def jnp_dtype(self) -> jnp.dtype:
        """``dtype`` as a jax dtype."""
        return jnp.dtype(self.dtype)

    @property
    def n_params(self) -> int:
        """Number of hidden weights (attention and MLP matrices), as TransformerLens counts: no embeddings, no biases.

        Grouped key/value heads are counted as stored.
        """
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.kv_heads)
        mlp = 0 if self.d_mlp is None or self.attn_only else self.d_model * self.d_mlp * (3 if self.gated_mlp else 2)
        return self.n_layers * (attention + mlp)

    def layer_kind(self, layer: int) -> str:
        """What a layer's compiled program must know of it: ``"global"`` or ``"local"``, and whether it rotates.

        A layer of a rotary model that does not rotate is ``"global unrotated"`` or ``"local unrotated"``.
        """
        reach = self.attn_types[layer] if self.use_local_attn and self.attn_types is not None else "global"
        return reach if self.rotary_layers is None or self.rotary_layers[layer] else f"{reach} unrotated"

    def is_local(self, layer: int) -> bool:
        """Whether a layer's attention sees only the last ``window_size`` keys."""
        return self.layer_kind(layer).startswith("local")

    def replace(self, **changes: Any) -> "HookedTransformerConfig":
        """Returns a copy with ``changes`` applied and validated.

        Fields at their derived value (``d_mlp`` at ``4 * d_model``, ``attn_scale`` at ``sqrt(d_head)`` …) follow.
        """
        self._refuse_unknown(changes)
        derived = dataclasses.replace(self, **_DERIVED)
        follow = {
            name: unset
            for name, unset in _DERIVED.items()
            if name not in changes and getattr(self, name) == getattr(derived, name)
        }
        return dataclasses.replace(self, **(follow | changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain, JSON-ready values; :meth:`from_dict` reads them back."""
        return {
            field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "HookedTransformerConfig":
        """Builds a config from a mapping.

        Raises:
            ConfigError: a key is not a field (names the nearest one), or a value does not validate.
        """
        cls._refuse_unknown(fields)
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
    def _refuse_unknown(cls, fields: Mapping[str, Any]) -> None:
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [f"{key!r} is not a config field.{nearest(key, names)}" for key in fields if key not in names]
        if unknown:
            raise ConfigError(" ".join(unknown))
