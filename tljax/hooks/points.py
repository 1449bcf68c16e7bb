"""The table of hook points: every point of a config in firing order, with its names, axes, sizes and dtype.

Name resolution, validation, ``model.hook_points()``, sweeps and the documentation all read this one table.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from tljax.config import HookedTransformerConfig, LayerKind
from tljax.hooks.point import POSITION_AXES
from tljax.hooks.splices import with_spliced_points
from tljax.numerics import widened

AttentionInput = Literal["shared", "per_head", "split"]
"""Ways of calling ln1: once, once with a head axis (``hook_attn_in``), or for each of q, k, v (``hook_q_input`` …)."""

AXES = (
    "batch", "pos", "query_pos", "key_pos", "head", "d_head", "all_heads", "latent", "d_model", "neuron", "d_vocab",
    "scale", "expert", "choice", "feature",
)  # fmt: skip

ENTRY, EXIT = "hook_resid_pre", "hook_resid_post"
"""The points where the residual stream enters and leaves a block."""
EMBEDDING, HEAD = "embedding", "head"
"""The stages before and after the blocks."""

_RESID = ("batch", "pos", "d_model")
_SCALE = ("batch", "pos", "scale")
_PER_HEAD = ("batch", "pos", "head", "d_head")
_PER_HEAD_MODEL = ("batch", "pos", "head", "d_model")
_SCORES = ("batch", "head", "query_pos", "key_pos")
_NEURONS = ("batch", "pos", "neuron")
_EXPERTS = ("batch", "pos", "expert")
_CHOICES = ("batch", "pos", "choice")


def stage_of(name: str) -> tuple[str, str]:
    """Returns the stage that a point or parameter belongs to, and its name within that stage.

    >>> [stage_of(name) for name in ("hook_embed", "blocks.3.attn.hook_z", "unembed.W_U")]
    [('embedding', 'hook_embed'), ('blocks.3.', 'attn.hook_z'), ('head', 'unembed.W_U')]
    """
    if name.startswith("blocks."):
        _, layer, relative = name.split(".", 2)
        return f"blocks.{layer}.", relative
    return (HEAD if name.startswith(("ln_final.", "unembed.")) else EMBEDDING), name


def layer_of(name: str) -> int | None:
    """Returns the layer of a point inside a block, else ``None``."""
    return int(name.split(".", 2)[1]) if name.startswith("blocks.") else None


@dataclasses.dataclass(frozen=True)
class HookPointSpec:
    """One row of the table.

    Attributes:
        name: full hook name.
        axes: one axis name for each dimension.
        meaning: what the activation is, in one line.
        dtype: of the activation.
        optional: exists only in runs that name it (or whose config switches it on).
        sizes: axis sizes fixed by the config; ``batch`` and the position axes come from the input.
        below: if the activation holds indices, how many values they can take.
        aliases: other names within its stage, ``"attn.q.hook_out"``, and other short names, ``"query"``. The part
            after ``hook_`` is always a short name and is not listed.
        adds_to: the point whose activation has this one as a summand, after at most a linear map and a norm.
        every_token: computed for every token even in a run that computes only some tokens' outputs.
        read_by: for a point between the residual stream and the heads, which of ``"qkv"`` read it. If these have
            separate inputs, the point fires once for each, with a head axis.
        asks_for: how ln1 is called in a run that names the point.
    """

    name: str
    axes: tuple[str, ...]
    meaning: str
    _: dataclasses.KW_ONLY
    dtype: np.dtype
    optional: bool = False
    sizes: tuple[tuple[str, int], ...] = ()
    below: int | None = None
    aliases: tuple[str, ...] = ()
    adds_to: str | None = None
    every_token: bool = False
    read_by: str = ""
    asks_for: AttentionInput = "shared"

    def shape(self, batch: int = 1, pos: int = 1) -> tuple[int, ...]:
        """Returns the shape of the activation for ``batch`` prompts of ``pos`` tokens."""
        known = {"batch": batch, **dict.fromkeys(POSITION_AXES, pos), **dict(self.sizes)}
        return tuple(known[axis] for axis in self.axes)

    @property
    def short(self) -> str:
        """TransformerLens's short name."""
        return self.name.rpartition(".")[2].removeprefix("hook_")

    @property
    def holds_numbers(self) -> bool:
        """Whether the activation holds whole numbers, such as token ids, and so has no gradient."""
        return self.dtype.kind in "iu"

    def named(self, name: str) -> "HookPointSpec":
        return dataclasses.replace(self, name=name)


@dataclasses.dataclass(frozen=True)
class Spellings:
    """Ways of naming the points of one stage.

    Attributes:
        exact: the point for each name or alias.
        others: the points for each short name, and for each end of a name after a dot.
    """

    exact: dict[str, str]
    others: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, rows: Sequence[HookPointSpec]) -> "Spellings":
        """Returns the spellings of a stage's points, named relative to it."""
        exact: dict[str, str] = {}
        others: dict[str, tuple[str, ...]] = {}
        for row in rows:
            exact |= {name: row.name for alias in row.aliases for name in (alias, alias.removeprefix("hook_"))}
            parts = row.name.split(".")
            ends = {row.short, *(".".join(parts[number:]) for number in range(1, len(parts)))}
            others |= {end: (*others.get(end, ()), row.name) for end in ends}
        return cls(exact | {row.name: row.name for row in rows}, others)

    def meanings(self, spelling: str, part: str = "") -> tuple[str, ...]:
        """Returns the points that a spelling could mean, all or only those of one part such as ``"ln1"``."""
        own = (self.exact[spelling],) if spelling in self.exact else ()
        others = self.others.get(spelling, ())
        if not part:
            return own or others
        return tuple(name for name in (*own, *others) if f".{name}".rpartition(".")[0].endswith(f".{part}"))


class HookTable(dict[str, HookPointSpec]):
    """A model's hook points by full name, in firing order."""

    @functools.cached_property
    def spellings(self) -> dict[str, Spellings]:
        """Ways of naming the points of each stage."""
        stages: dict[str, list[HookPointSpec]] = {EMBEDDING: [], HEAD: []}
        for name, row in self.items():
            stage, relative = stage_of(name)
            stages.setdefault(stage, []).append(row.named(relative))
        return {stage: Spellings.of(rows) for stage, rows in stages.items()}


def _rows(
    cfg: HookedTransformerConfig,
    *,
    head: int | None = None,
    neurons: int | None = None,
    head_width: int | None = None,
    latent: int = 0,
    **columns: Any,
) -> functools.partial[HookPointSpec]:
    """Returns a constructor of table rows with the config's sizes and these columns."""
    head = cfg.n_heads if head is None else head
    sizes = (
        ("d_model", cfg.d_model),
        ("head", head),
        ("d_head", head_width or cfg.d_head),
        ("latent", latent),
        ("all_heads", head * cfg.d_head),
        ("neuron", neurons or cfg.d_mlp or 0),
        ("d_vocab", cfg.d_vocab_out),
        ("scale", 1),
        ("expert", cfg.num_experts or 0),
        ("choice", cfg.experts_per_token or 0),
    )
    return functools.partial(HookPointSpec, sizes=sizes, dtype=np.dtype(cfg.jnp_dtype), **columns)


@functools.lru_cache(maxsize=256)
def embedding_points(cfg: HookedTransformerConfig) -> tuple[HookPointSpec, ...]:
    """Returns the points of the embedding stage."""
    row, integers = _rows(cfg), np.dtype(np.int32)
    points = [
        row("hook_tokens", ("batch", "pos"), "token ids going in", optional=not cfg.use_hook_tokens, dtype=integers,
            below=cfg.d_vocab),
        *(_norm_points(row, "embed.ln") if cfg.post_embedding_ln else ()),
        row("hook_embed", _RESID, "token embedding", adds_to=ENTRY, aliases=("embed.hook_out",)),
    ]  # fmt: skip
    if cfg.learns_positions:
        to_stream = cfg.positional_embedding_type == "standard"
        meaning = "learned position embedding" + ("" if to_stream else ", which queries and keys read")
        adds_to = ENTRY if to_stream else None
        points.append(row("hook_pos_embed", _RESID, meaning, adds_to=adds_to, aliases=("pos_embed.hook_out",)))
    return with_spliced_points(points, cfg.embedding_splices)


@functools.lru_cache(maxsize=256)
def block_points(
    cfg: HookedTransformerConfig, kind: LayerKind, attention_input: AttentionInput = "shared"
) -> tuple[HookPointSpec, ...]:
    """Returns the points of a block of a kind (:class:`~tljax.config.LayerKind`), named relative to it."""
    row = _rows(cfg)
    after_attention = EXIT if cfg.attn_only or cfg.parallel_attn_mlp else "hook_resid_mid"
    points = (
        *_attention_input_points(cfg, attention_input),
        *_reader_points(cfg, attention_input),
        *_attention_points(cfg),
        *_post_norm_points("ln1_post", cfg),
        row("hook_attn_out", _RESID, "attention output added to the residual stream", aliases=("attn.hook_out",),
            adds_to=None if cfg.use_normalization_of_residual else after_attention),
        *_residual_norm_points("ln1", cfg),
        *(() if cfg.attn_only else _mlp_branch_points(cfg, kind)),
        *(() if cfg.attn_only else _residual_norm_points("ln2", cfg)),
        row(EXIT, _RESID, "residual stream after the block", aliases=("hook_out",)),
    )  # fmt: skip
    return with_spliced_points(points, kind.splices)


def _attention_input_points(cfg: HookedTransformerConfig, attention_input: AttentionInput) -> Iterator[HookPointSpec]:
    row, kv_row = _rows(cfg, every_token=True), _rows(cfg, every_token=True, head=cfg.kv_heads)
    yield row(ENTRY, _RESID, "residual stream before the block", aliases=("hook_in",))
    if cfg.kv_heads == cfg.n_heads:
        yield row("hook_attn_in", _PER_HEAD_MODEL, "attention input for each head, before ln1", asks_for="per_head",
                  optional=not cfg.use_attn_in, aliases=("attn.hook_attn_in",))  # fmt: skip
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        yield (row if letter == "q" else kv_row)(
            f"hook_{letter}_input", _PER_HEAD_MODEL, f"{word} input for each head, before ln1", asks_for="split",
            optional=not cfg.use_split_qkv_input, aliases=(f"attn.hook_{letter}_input",),
        )  # fmt: skip
    if cfg.has_norms_before:
        per_head = attention_input != "shared"
        yield from _norm_points(
            kv_row if attention_input == "split" else row, "ln1", per_head=per_head, read_by="qkv", every_token=True
        )


def _norm_points(
    row: functools.partial[HookPointSpec],
    name: str,
    *,
    per_head: bool = False,
    axis: str = "d_model",
    **columns: Any,
) -> Iterator[HookPointSpec]:
    lead = ("batch", "pos", "head") if per_head else ("batch", "pos")
    row = functools.partial(row, dtype=widened(row.keywords["dtype"]), **columns)
    yield row(f"{name}.hook_scale", (*lead, "scale"), f"what {name} divides by")
    yield row(f"{name}.hook_normalized", (*lead, axis), f"{name}'s output before its weight and bias")


def _qk_norm_points(cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    joint = cfg.qk_norm_span == "joint"
    for letter, heads in (("q", cfg.n_heads), ("k", cfg.kv_heads)):
        row = _rows(cfg, head=heads, every_token=letter == "k")
        axis = "all_heads" if joint else "d_head"
        yield from _norm_points(row, f"attn.{letter}_norm", per_head=not joint, axis=axis)


def _post_norm_points(name: str, cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    if cfg.has_norms_after:
        yield from _norm_points(_rows(cfg), name)


def _reader_points(cfg: HookedTransformerConfig, attention_input: AttentionInput) -> Iterator[HookPointSpec]:
    kv_row = _rows(cfg, head=cfg.kv_heads, every_token=True)
    per_head = attention_input != "shared"
    if cfg.q_lora_rank is not None:
        row = _rows(cfg, latent=cfg.q_lora_rank, read_by="q")
        yield from _latent_points(row, "q", "queries", per_head)
    yield _rows(cfg)("attn.hook_q", _PER_HEAD, "queries", aliases=("query", "attn.q.hook_out"))
    if cfg.kv_lora_rank is not None:
        row = _rows(cfg, latent=cfg.kv_lora_rank, read_by="kv", every_token=True)
        yield from _latent_points(row, "kv", "keys and values", per_head)
    yield kv_row("attn.hook_k", _PER_HEAD, "keys", aliases=("key", "attn.k.hook_out"))
    value_row = _rows(cfg, head=cfg.kv_heads, head_width=cfg.value_width, every_token=True)
    yield value_row("attn.hook_v", _PER_HEAD, "values", aliases=("value", "attn.v.hook_out"))


def _latent_points(
    row: functools.partial[HookPointSpec], name: str, whose: str, per_head: bool
) -> Iterator[HookPointSpec]:
    yield from _norm_points(row, f"attn.{name}_latent_norm", per_head=per_head, axis="latent")
    axes = ("batch", "pos", "head", "latent") if per_head else ("batch", "pos", "latent")
    yield row(f"attn.hook_{name}_latent", axes, f"latent of the {whose}, normalised")


def _residual_norm_points(name: str, cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    if cfg.use_normalization_of_residual:
        yield from _norm_points(_rows(cfg), name)


def _attention_points(cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    row, value_row = _rows(cfg), _rows(cfg, head_width=cfg.value_width)
    if cfg.use_qk_norm and not cfg.qk_norm_after_rotary:
        yield from _qk_norm_points(cfg)
    if cfg.positional_embedding_type == "rotary":
        yield row("attn.hook_rot_q", _PER_HEAD, "queries after rotation")
        yield _rows(cfg, head=cfg.kv_heads, every_token=True)("attn.hook_rot_k", _PER_HEAD, "keys after rotation")
    if cfg.use_qk_norm and cfg.qk_norm_after_rotary:
        yield from _qk_norm_points(cfg)
    yield row("attn.hook_attn_scores", _SCORES, "attention scores, masked with -inf", aliases=("attn_logits",))
    pattern = ("attn", "attn.hook_attn")
    yield row("attn.hook_pattern", _SCORES, "attention pattern (softmax of the scores)", aliases=pattern)
    yield value_row("attn.hook_z", _PER_HEAD, "pattern-weighted values, before W_O", adds_to="hook_attn_out",
                    aliases=("attn.o.hook_in",))  # fmt: skip
    yield row("attn.hook_result", _PER_HEAD_MODEL, "each head's output, without b_O", adds_to="hook_attn_out",
              optional=not cfg.use_attn_result)  # fmt: skip


def _mlp_branch_points(cfg: HookedTransformerConfig, kind: LayerKind) -> Iterator[HookPointSpec]:
    row = _rows(cfg)
    if not cfg.parallel_attn_mlp:
        yield row("hook_resid_mid", _RESID, "residual stream between attention and MLP", aliases=("ln2.hook_in",))
    yield row("hook_mlp_in", _RESID, "MLP branch input, before ln2", optional=not cfg.use_hook_mlp_in)
    if cfg.has_norms_before:
        yield from _norm_points(row, "ln2")
    yield from _experts_points(cfg) if kind.experts else _mlp_points(cfg)
    yield from _post_norm_points("ln2_post", cfg)
    yield row("hook_mlp_out", _RESID, "MLP output added to the residual stream", aliases=("mlp.hook_out",),
              adds_to=None if cfg.use_normalization_of_residual else EXIT)  # fmt: skip


def _mlp_points(cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    row = _rows(cfg)
    yield row("mlp.hook_in", _RESID, "MLP input, after ln2", optional=True)
    aliases = {
        "mlp.hook_pre": ("mlp_pre", "mlp.gate.hook_out" if cfg.gated_mlp else "mlp.in.hook_out"),
        "mlp.hook_pre_linear": ("mlp.in.hook_out",),
        "mlp.hook_mid": ("mlp_mid",),
        "mlp.hook_post": ("mlp_post", "mlp.out.hook_in"),
    }
    for point in _neuron_points(row, "mlp", cfg):
        yield dataclasses.replace(point, aliases=aliases.get(point.name, ()))


def _neuron_points(
    row: functools.partial[HookPointSpec],
    name: str,
    cfg: HookedTransformerConfig,
    axes: tuple[str, ...] = _NEURONS,
    whose: str = "",
) -> Iterator[HookPointSpec]:
    branch = "gate branch before the activation" if cfg.gated_mlp else "neurons before the activation"
    yield row(f"{name}.hook_pre", axes, branch + whose)
    if cfg.gated_mlp:
        linear = "linear branch, x @ W_in" + (" + b_in" if cfg.gated_mlp_bias and axes == _NEURONS else "")
        yield row(f"{name}.hook_pre_linear", axes, linear + whose)
    if cfg.act_fn == "solu_ln":
        yield row(f"{name}.hook_mid", axes, f"neurons after the activation, before {name}.ln")
        yield from _norm_points(row, f"{name}.ln", axis="neuron")
    yield row(f"{name}.hook_post", axes, "neurons after the activation, before W_out" + whose)


def _experts_points(cfg: HookedTransformerConfig) -> Iterator[HookPointSpec]:
    row, wide = _rows(cfg), widened(np.dtype(cfg.jnp_dtype))
    precise = wide if cfg.router == "sigmoid" or cfg.expert_biases else np.dtype(cfg.jnp_dtype)
    yield row("mlp.hook_in", _RESID, "input of router and experts, after ln2", optional=True)
    yield row("mlp.hook_router_scores", _EXPERTS, "the router's score of each expert", dtype=precise)
    weights = row("mlp.hook_expert_weights", _EXPERTS, "from which the chosen experts' weights are taken", dtype=wide)
    choice = row("mlp.hook_expert_indices", _CHOICES, "numbers of the chosen experts", dtype=np.dtype(np.int32),
                 below=cfg.num_experts)  # fmt: skip
    yield from (weights, choice) if cfg.router in ("softmax", "sigmoid") else (choice, weights)
    of_experts = _rows(cfg, neurons=cfg.d_expert)
    yield from _neuron_points(of_experts, "mlp.experts", cfg, (*_CHOICES, "neuron"), ", of each chosen expert")
    result = "output of each routed expert, weighted; zero where it is not chosen"
    yield row("mlp.hook_expert_result", (*_EXPERTS, "d_model"), result, optional=True)
    if cfg.d_shared_expert is not None:
        shared = _rows(cfg, neurons=cfg.d_shared_expert)
        yield shared("mlp.shared.hook_in", _RESID, "input of the shared expert", optional=True)
        yield from _neuron_points(shared, "mlp.shared", cfg, whose=", of the shared expert")
        if cfg.gate_shared_expert:
            yield row("mlp.hook_shared_gate", _SCALE, "what the shared expert's output is multiplied by")


@functools.lru_cache(maxsize=256)
def head_points(cfg: HookedTransformerConfig) -> tuple[HookPointSpec, ...]:
    """Returns the points of the final norm and the unembedding."""
    row = _rows(cfg)
    norm = _norm_points(row, "ln_final") if cfg.has_final_norm else ()
    return (
        *(dataclasses.replace(point, aliases=(point.short,)) for point in norm),
        row("unembed.hook_in", _RESID, "what is unembedded"),
        row("unembed.hook_out", ("batch", "pos", "d_vocab"), "logits before any soft cap", aliases=("hook_unembed",)),
    )


def attention_input(rows: Iterable[HookPointSpec], names: Iterable[str]) -> AttentionInput:
    """Returns how a block calls ln1 in a run that names some of its points; ``rows`` are the block's points."""
    asked = {row.asks_for for row in rows if row.name in names}
    return "split" if "split" in asked else "per_head" if "per_head" in asked else "shared"


@functools.lru_cache(maxsize=256)
def point_table(cfg: HookedTransformerConfig) -> HookTable:
    """Returns every hook point of a model, by full name, in firing order."""
    points = [*embedding_points(cfg)]
    for layer, kind in enumerate(cfg.layer_kinds):
        in_full_cache = [point.name for point in block_points(cfg, kind) if not point.optional]
        form = attention_input(block_points(cfg, kind), in_full_cache)
        points += [point.named(f"blocks.{layer}.{point.name}") for point in block_points(cfg, kind, form)]
    return HookTable((point.name, point) for point in (*points, *head_points(cfg)))
