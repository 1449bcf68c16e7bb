"""The table of hook points: for a config, every point in firing order with its axes, sizes and meaning.

Validation, ``model.hook_points()``, shape estimates and the documentation all read this one table.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

from tljax.config import HookedTransformerConfig, LayerKind

AttentionInput = Literal["shared", "per_head", "split"]
"""How ln1 is called: once, once with a head axis (``hook_attn_in``), or for q, k and v apart (``hook_q_input`` …)."""

AXES = (
    "batch", "pos", "query_pos", "key_pos", "head", "d_head", "all_heads", "latent", "d_model", "neuron", "d_vocab",
    "scale", "expert", "choice",
)  # fmt: skip

_RESID = ("batch", "pos", "d_model")
_SCALE = ("batch", "pos", "scale")
_PER_HEAD = ("batch", "pos", "head", "d_head")
_PER_HEAD_MODEL = ("batch", "pos", "head", "d_model")
_SCORES = ("batch", "head", "query_pos", "key_pos")
_NEURONS = ("batch", "pos", "neuron")
_EXPERTS = ("batch", "pos", "expert")
_CHOICES = ("batch", "pos", "choice")


@dataclasses.dataclass(frozen=True)
class HookPointSpec:
    """One row of the table.

    Attributes:
        name: full hook name.
        axes: one axis name for each dimension.
        meaning: what the activation is, in one line.
        optional: exists only in runs that name it (or whose config switches it on).
        sizes: axis sizes fixed by the config; ``batch`` and the position axes come from the input.
        below: where the activation holds numbers of things, how many things there are.
    """

    name: str
    axes: tuple[str, ...]
    meaning: str
    optional: bool = False
    sizes: tuple[tuple[str, int], ...] = ()
    below: int | None = None

    def shape(self, batch: int = 1, pos: int = 1) -> tuple[int, ...]:
        """Shape of the activation for ``batch`` prompts of ``pos`` tokens."""
        known = {"batch": batch, "pos": pos, "query_pos": pos, "key_pos": pos, **dict(self.sizes)}
        return tuple(known[axis] for axis in self.axes)

    def prefixed(self, prefix: str) -> "HookPointSpec":
        return dataclasses.replace(self, name=prefix + self.name)


def _sizes(
    cfg: HookedTransformerConfig,
    head: int | None = None,
    width: int | None = None,
    neurons: int | None = None,
    head_width: int | None = None,
    latent: int | None = None,
) -> tuple[tuple[str, int], ...]:
    return (
        ("d_model", width or cfg.d_model),
        ("head", head or cfg.n_heads),
        ("d_head", head_width or cfg.d_head),
        ("latent", latent or 0),
        ("all_heads", (head or cfg.n_heads) * cfg.d_head),
        ("neuron", neurons or cfg.d_mlp or 0),
        ("d_vocab", cfg.d_vocab_out),
        ("scale", 1),
        ("expert", cfg.num_experts or 0),
        ("choice", cfg.experts_per_token or 0),
    )


@functools.lru_cache(maxsize=256)
def embedding_points(cfg: HookedTransformerConfig) -> tuple[HookPointSpec, ...]:
    """Points of the embedding stage."""
    sizes = _sizes(cfg)
    points = [
        HookPointSpec(
            "hook_tokens", ("batch", "pos"), "token ids going in", not cfg.use_hook_tokens, sizes, cfg.d_vocab
        ),
        *(_norm_points("embed.ln", cfg, sizes) if cfg.post_embedding_ln else ()),
        HookPointSpec("hook_embed", _RESID, "token embedding", sizes=sizes),
    ]
    if cfg.learns_positions:
        read = "" if cfg.positional_embedding_type == "standard" else ", which queries and keys read"
        points.append(HookPointSpec("hook_pos_embed", _RESID, f"learned position embedding{read}", sizes=sizes))
    return tuple(points)


@functools.lru_cache(maxsize=256)
def block_points(
    cfg: HookedTransformerConfig, kind: LayerKind, attention_input: AttentionInput = "shared"
) -> tuple[HookPointSpec, ...]:
    """Points of a block of a kind (:meth:`~tljax.config.HookedTransformerConfig.layer_kind`), named relative to it."""
    return (
        *_attention_input_points(cfg, attention_input),
        *_reader_points(cfg, attention_input),
        *_attention_points(cfg),
        *_post_norm_points("ln1_post", cfg),
        HookPointSpec("hook_attn_out", _RESID, "attention output added to the residual stream", sizes=_sizes(cfg)),
        *_residual_norm_points("ln1", cfg),
        *(() if cfg.attn_only else _mlp_branch_points(cfg, kind)),
        *(() if cfg.attn_only else _residual_norm_points("ln2", cfg)),
        HookPointSpec("hook_resid_post", _RESID, "residual stream after the block", sizes=_sizes(cfg)),
    )


def _attention_input_points(cfg: HookedTransformerConfig, attention_input: AttentionInput) -> Iterator[HookPointSpec]:
    sizes, kv_sizes = _sizes(cfg), _sizes(cfg, head=cfg.kv_heads)
    yield HookPointSpec("hook_resid_pre", _RESID, "residual stream before the block", sizes=sizes)
    if cfg.kv_heads == cfg.n_heads:
        yield HookPointSpec(
            "hook_attn_in",
            _PER_HEAD_MODEL,
            "attention input for each head, before ln1",
            not cfg.use_attn_in,
            sizes,
        )
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        yield HookPointSpec(
            f"hook_{letter}_input", _PER_HEAD_MODEL, f"{word} input for each head, before ln1",
            not cfg.use_split_qkv_input, sizes if letter == "q" else kv_sizes,
        )  # fmt: skip
    if cfg.has_norms_before:
        per_head = attention_input != "shared"
        head_sizes = kv_sizes if attention_input == "split" else sizes
        yield from _norm_points("ln1", cfg, head_sizes if per_head else sizes, per_head=per_head)


def _norm_points(
    name: str,
    cfg: HookedTransformerConfig,
    sizes: tuple[tuple[str, int], ...],
    per_head: bool = False,
    axis: str = "d_model",
) -> Iterator[HookPointSpec]:
    lead = ("batch", "pos", "head") if per_head else ("batch", "pos")
    yield HookPointSpec(f"{name}.hook_scale", (*lead, "scale"), f"what {name} divides by", sizes=sizes)
    yield HookPointSpec(
        f"{name}.hook_normalized", (*lead, axis), f"{name}'s output before its weight and bias", sizes=sizes
    )


def _qk_norm_points(cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    joint = cfg.qk_norm_span == "joint"
    for letter, heads in (("q", cfg.n_heads), ("k", cfg.kv_heads)):
        sizes = _sizes(cfg, head=heads)
        yield from _norm_points(f"attn.{letter}_norm", cfg, sizes, not joint, "all_heads" if joint else "d_head")


def _post_norm_points(name: str, cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    if cfg.has_norms_after:
        yield from _norm_points(name, cfg, _sizes(cfg))


def _reader_points(cfg: HookedTransformerConfig, attention_input: AttentionInput) -> Iterator[HookPointSpec]:
    per_head = attention_input != "shared"
    if cfg.q_lora_rank is not None:
        yield from _latent_points(cfg, "q", "queries", cfg.q_lora_rank, per_head)
    yield HookPointSpec("attn.hook_q", _PER_HEAD, "queries", sizes=_sizes(cfg))
    if cfg.kv_lora_rank is not None:
        yield from _latent_points(cfg, "kv", "keys and values", cfg.kv_lora_rank, per_head)
    yield HookPointSpec("attn.hook_k", _PER_HEAD, "keys", sizes=_sizes(cfg, head=cfg.kv_heads))
    value_sizes = _sizes(cfg, head=cfg.kv_heads, head_width=cfg.value_width)
    yield HookPointSpec("attn.hook_v", _PER_HEAD, "values", sizes=value_sizes)


def _latent_points(
    cfg: HookedTransformerConfig, name: str, whose: str, rank: int, per_head: bool
) -> Iterator[HookPointSpec]:
    sizes = _sizes(cfg, latent=rank)
    yield from _norm_points(f"attn.{name}_latent_norm", cfg, sizes, per_head, "latent")
    axes = ("batch", "pos", "head", "latent") if per_head else ("batch", "pos", "latent")
    yield HookPointSpec(f"attn.hook_{name}_latent", axes, f"latent of the {whose}, normalised", sizes=sizes)


def _residual_norm_points(name: str, cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    if cfg.use_normalization_of_residual:
        yield from _norm_points(name, cfg, _sizes(cfg))


def _attention_points(cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    sizes, kv_sizes = _sizes(cfg), _sizes(cfg, head=cfg.kv_heads)
    if cfg.use_qk_norm and not cfg.qk_norm_after_rotary:
        yield from _qk_norm_points(cfg)
    if cfg.positional_embedding_type == "rotary":
        yield HookPointSpec("attn.hook_rot_q", _PER_HEAD, "queries after rotation", sizes=sizes)
        yield HookPointSpec("attn.hook_rot_k", _PER_HEAD, "keys after rotation", sizes=kv_sizes)
    if cfg.use_qk_norm and cfg.qk_norm_after_rotary:
        yield from _qk_norm_points(cfg)
    yield HookPointSpec("attn.hook_attn_scores", _SCORES, "attention scores, masked with -inf", sizes=sizes)
    yield HookPointSpec("attn.hook_pattern", _SCORES, "attention pattern (softmax of the scores)", sizes=sizes)
    z_sizes = _sizes(cfg, head_width=cfg.value_width)
    yield HookPointSpec("attn.hook_z", _PER_HEAD, "pattern-weighted values, before W_O", sizes=z_sizes)
    yield HookPointSpec(
        "attn.hook_result", _PER_HEAD_MODEL, "each head's output, without b_O", not cfg.use_attn_result, sizes
    )


def _mlp_branch_points(cfg: HookedTransformerConfig, kind: LayerKind) -> Iterator[HookPointSpec]:
    sizes = _sizes(cfg)
    if not cfg.parallel_attn_mlp:
        yield HookPointSpec("hook_resid_mid", _RESID, "residual stream between attention and MLP", sizes=sizes)
    yield HookPointSpec("hook_mlp_in", _RESID, "MLP branch input, before ln2", not cfg.use_hook_mlp_in, sizes)
    if cfg.has_norms_before:
        yield from _norm_points("ln2", cfg, sizes)
    if kind.experts:
        yield from _experts_points(cfg)
    else:
        yield HookPointSpec("mlp.hook_in", _RESID, "MLP input, after ln2", True, sizes)
        yield from _neuron_points("mlp", cfg, sizes)
    yield from _post_norm_points("ln2_post", cfg)
    yield HookPointSpec("hook_mlp_out", _RESID, "MLP output added to the residual stream", sizes=sizes)


def _neuron_points(
    name: str,
    cfg: HookedTransformerConfig,
    sizes: tuple[tuple[str, int], ...],
    axes: tuple[str, ...] = _NEURONS,
    whose: str = "",
) -> Iterator[HookPointSpec]:
    branch = "gate branch before the activation" if cfg.gated_mlp else "neurons before the activation"
    yield HookPointSpec(f"{name}.hook_pre", axes, branch + whose, sizes=sizes)
    if cfg.gated_mlp:
        linear = "linear branch, x @ W_in" + (" + b_in" if cfg.gated_mlp_bias and axes == _NEURONS else "")
        yield HookPointSpec(f"{name}.hook_pre_linear", axes, linear + whose, sizes=sizes)
    if cfg.act_fn == "solu_ln":
        yield HookPointSpec(f"{name}.hook_mid", axes, f"neurons after the activation, before {name}.ln", sizes=sizes)
        yield from _norm_points(f"{name}.ln", cfg, sizes, axis="neuron")
    yield HookPointSpec(f"{name}.hook_post", axes, "neurons after the activation, before W_out" + whose, sizes=sizes)


def _experts_points(cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    sizes, of_experts = _sizes(cfg), _sizes(cfg, neurons=cfg.d_expert)
    yield HookPointSpec("mlp.hook_in", _RESID, "input of router and experts, after ln2", True, sizes)
    yield HookPointSpec("mlp.hook_router_scores", _EXPERTS, "the router's score of each expert", sizes=sizes)
    weights = HookPointSpec(
        "mlp.hook_expert_weights", _EXPERTS, "from which the chosen experts' weights are taken", sizes=sizes
    )
    choice = HookPointSpec(
        "mlp.hook_expert_indices", _CHOICES, "numbers of the chosen experts", sizes=sizes, below=cfg.num_experts
    )
    yield from (weights, choice) if cfg.router in ("softmax", "sigmoid") else (choice, weights)
    axes = (*_CHOICES, "neuron")
    yield from _neuron_points("mlp.experts", cfg, of_experts, axes, ", of each chosen expert")
    if cfg.d_shared_expert is not None:
        shared = _sizes(cfg, neurons=cfg.d_shared_expert)
        yield HookPointSpec("mlp.shared.hook_in", _RESID, "input of the shared expert", True, shared)
        yield from _neuron_points("mlp.shared", cfg, shared, whose=", of the shared expert")
        if cfg.gate_shared_expert:
            yield HookPointSpec("mlp.hook_shared_gate", _SCALE, "what the shared expert's output is multiplied by",
                                sizes=sizes)  # fmt: skip


@functools.lru_cache(maxsize=256)
def head_points(cfg: HookedTransformerConfig) -> tuple[HookPointSpec, ...]:
    """Points of the final norm and the unembedding."""
    sizes = _sizes(cfg)
    norm = _norm_points("ln_final", cfg, sizes) if cfg.has_final_norm else ()
    return (
        *norm,
        HookPointSpec("unembed.hook_in", _RESID, "what is unembedded", sizes=sizes),
        HookPointSpec("unembed.hook_out", ("batch", "pos", "d_vocab"), "logits before any soft cap", sizes=sizes),
    )


def default_attention_input(cfg: HookedTransformerConfig) -> AttentionInput:
    """The form of ln1's input in a full cache of this config."""
    if cfg.use_split_qkv_input:
        return "split"
    return "per_head" if cfg.use_attn_in and cfg.kv_heads == cfg.n_heads else "shared"


@functools.lru_cache(maxsize=256)
def point_table(cfg: HookedTransformerConfig) -> dict[str, HookPointSpec]:
    """Every hook point of a model, by full name, in firing order."""
    own = default_attention_input(cfg)
    points = [
        *embedding_points(cfg),
        *(
            point.prefixed(f"blocks.{layer}.")
            for layer, kind in enumerate(cfg.layer_kinds)
            for point in block_points(cfg, kind, own)
        ),
        *head_points(cfg),
    ]
    return {point.name: point for point in points}
