"""Weight processing: folding and centring that keep a model's function and make its weights easier to read.

TransformerLens's steps, each a pure function of parameters and applied only where it is exact
(:func:`tljax.weights.steps.why_not`):

- ``fold_ln``: a norm's gain and bias move into the matrices that read it, which are then centred along
  ``d_model`` (a layer norm's output has no mean, so that part of them is never used). Not for layer norms with
  experts or gated MLPs (except with ``gated_mlp_bias``): gates and routers have no bias that could take the norm's.
- ``center_writing_weights``: whatever writes to the residual stream loses its mean along ``d_model``. Only
  when every reader is a layer norm, which subtracts that mean anyway; never with RMS norms, with ``final_rms`` or
  with norms on what attention and MLP put out.
- ``center_unembed``: ``W_U`` and ``b_U`` lose their mean over the vocabulary: logits shift together,
  probabilities stay. Not under an output soft cap, which does not commute with the shift.
- ``fold_value_biases``: attention patterns sum to one, so ``b_V`` reaches the output as a constant and moves
  to ``b_O``. Not with attention sinks (patterns sum to less than one) or clipped values.
- ``refactor_factored_attn_matrices``, only when asked for: each head's query-key and output-value matrices are
  factored by their singular value decomposition.

A step that does not apply is skipped. Arithmetic is in float32, or in float64 where numbers are read or kept in it;
results return to their own dtype.
Applying the steps a second time changes no bit: a row whose mean is rounding noise is left as it is.
"""

import functools
import warnings
from typing import Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.modules.parameters import stored_dtype
from tljax.typing import Params
from tljax.weights.factors import refactor_heads
from tljax.weights.steps import ProcessingOptions, Steps

HEAD = ("ln_final", "unembed")
_READERS = ("Q", "K", "V", "Q_down", "KV_down", "K_rot")
"""Attention weights that read ln1; in latent attention, the projections to the latents, whose norms are not folded."""


@functools.partial(typed, receiver=Steps.for_config)
def process_weights(
    params: Params, cfg: HookedTransformerConfig, **steps: Unpack[ProcessingOptions]
) -> tuple[Params, HookedTransformerConfig]:
    """Returns processed parameters and the config that goes with them; log-probabilities are unchanged.

    Args:
        params: nested parameters; not modified.
        cfg: their config.
        **steps: ``fold_ln``, ``center_writing_weights``, ``center_unembed`` and ``fold_value_biases``, on by default,
            and ``refactor_factored_attn_matrices``: see :meth:`tljax.weights.steps.Steps.for_config`.

    Returns:
        ``(params, cfg)``, in the dtypes and on the devices they came with; ``cfg.weight_processing`` names what was
        done (:func:`tljax.weights.steps.processing_report` says why the rest was not).

    Raises:
        ConfigError: ``refactor_factored_attn_matrices`` was asked for where it is not exact.
    """
    chosen = Steps.for_config(cfg, **steps)
    embed = {name: part for name, part in params.items() if name not in (*HEAD, "blocks")}
    head = {name: part for name, part in params.items() if name in HEAD}
    blocks = tuple(process_stage(block, chosen) for block in params["blocks"])
    processed = {**process_stage(embed, chosen), "blocks": blocks, **process_stage(head, chosen)}
    return processed, chosen.config_after(cfg)


def process_and_reuse(params: Params, steps: Steps, dtype: str | None = None) -> Params:
    """Processes one stage in the memory of its parameters, which are gone afterwards.

    Args:
        params, steps, dtype: as in :func:`process_stage`. Memory is used again where dtype and sharding stay.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # norms that are folded
        return _process_and_reuse(params, steps, dtype)


def process_stage(params: Params, steps: Steps, dtype: str | None = None) -> Params:
    """Processes one stage of the parameters, so that a checkpoint can be processed while it streams in.

    Compiled once for the embedding, once for the head and once for all blocks of equal shape.

    Args:
        params: the embeddings, one block, or ``ln_final`` and ``unembed``.
        steps: the steps to apply.
        dtype: dtype of the result; ``None`` keeps that of each parameter.
    """
    return _process_anew(params, steps, dtype)


def _process(params: Params, steps: Steps, dtype: str | None) -> Params:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    stored = {path: stored_dtype(path[-1].key, jnp.dtype(dtype or leaf.dtype)) for path, leaf in leaves}
    wide = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.astype(_widest(leaf.dtype, stored[path])), params)
    coarsest = max(stored.values(), key=lambda kind: float(jnp.finfo(kind).eps))
    process = process_block if "attn" in params else process_head if "unembed" in params else process_embed
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(stored[path]), process(wide, steps, coarsest)
    )


_process_anew = jax.jit(_process, static_argnames=("steps", "dtype"))
_process_and_reuse = jax.jit(_process, static_argnames=("steps", "dtype"), donate_argnames="params")


def _widest(*dtypes: jnp.dtype) -> str:
    """Returns the dtype to compute in: float64 if any of ``dtypes`` is float64, otherwise float32."""
    return "float64" if "float64" in map(str, dtypes) else "float32"


def process_embed(params: Params, steps: Steps, stored: jnp.dtype) -> Params:
    """Processes ``{"embed": ..., "pos_embed": ...}``; ``stored`` is the dtype the result will have."""
    if not steps.center_writing_weights:
        return params
    tables = {("embed", "W_E"), ("pos_embed", "W_pos")}
    return {
        part: {name: _center(leaf, 1, stored) if (part, name) in tables else leaf for name, leaf in leaves.items()}
        for part, leaves in params.items()
    }


def process_block(params: Params, steps: Steps, stored: jnp.dtype) -> Params:
    """Processes one block: folds its norms, moves its value bias, centres what it writes."""
    block = {name: dict(part) for name, part in params.items()}
    attn, mlp = block["attn"], block.get("mlp")
    if steps.fold_ln and "ln1" in block:
        norm = _whole_gain(block.pop("ln1"), steps)
        for x in _READERS:
            if f"b_{x}" in attn:
                attn[f"W_{x}"], attn[f"b_{x}"] = _fold(norm, attn[f"W_{x}"], attn[f"b_{x}"], stored)
        if mlp:
            norm = _whole_gain(block.pop("ln2"), steps)
            mlp = _fold_experts(norm, mlp, stored) if "experts" in mlp else _fold_mlp(norm, mlp, stored)
    if steps.fold_ln and mlp and "ln" in mlp:
        inner = {name: part for name, part in mlp.items() if name != "ln"}
        inner["W_out"], inner["b_out"] = _fold(mlp["ln"], mlp["W_out"], mlp["b_out"], stored)
        mlp = inner
    if steps.fold_value_biases:
        values = jnp.repeat(attn["b_V"], attn["W_O"].shape[0] // attn["b_V"].shape[0], axis=0)
        attn["b_O"] += jnp.einsum("nh,nhm->m", values, attn["W_O"], precision="highest")
        attn["b_V"] = jnp.zeros_like(attn["b_V"])
    if steps.center_writing_weights:
        attn |= {name: _center(attn[name], -1, stored) for name in ("W_O", "b_O")}
        if mlp:
            parts = {name: _center_output(mlp[name], stored) for name in ("experts", "shared") if name in mlp}
            mlp = mlp | parts if parts else _center_output(mlp, stored)
    if steps.refactor_factored_attn_matrices:
        block["attn"] = refactor_heads(attn)
    return block if mlp is None else block | {"mlp": mlp}


def _fold_mlp(norm: Params, mlp: Params, stored: jnp.dtype) -> Params:
    mlp = dict(mlp)
    mlp["W_in"], mlp["b_in"] = _fold(norm, mlp["W_in"], mlp["b_in"], stored)
    if "b_gate" in mlp:
        mlp["W_gate"], mlp["b_gate"] = _fold(norm, mlp["W_gate"], mlp["b_gate"], stored)
    elif "W_gate" in mlp:
        mlp["W_gate"] = _scale(mlp["W_gate"], norm["w"])
    return mlp


def _fold_experts(norm: Params, moe: Params, stored: jnp.dtype) -> Params:
    """Moves an RMS norm's gain into the router, every expert, the shared expert and its gate."""
    read = {name: _scale(moe[name], norm["w"]) for name in ("W_router", "W_shared_gate") if name in moe}
    experts = {
        name: jax.vmap(_scale, (0, None))(part, norm["w"]) if name in ("W_in", "W_gate") else part
        for name, part in moe["experts"].items()
    }
    shared = {"shared": _fold_mlp(norm, moe["shared"], stored)} if "shared" in moe else {}
    return moe | read | {"experts": experts} | shared


def _center_output(mlp: Params, stored: jnp.dtype) -> Params:
    return mlp | {name: _center(mlp[name], -1, stored) for name in ("W_out", "b_out") if name in mlp}


def process_head(params: Params, steps: Steps, stored: jnp.dtype) -> Params:
    """Processes ``{"ln_final": ..., "unembed": ...}``."""
    head = {name: dict(part) for name, part in params.items()}
    unembed = head["unembed"]
    if steps.fold_ln:
        norm = _whole_gain(head.pop("ln_final"), steps)
        unembed["W_U"], unembed["b_U"] = _fold(norm, unembed["W_U"], unembed["b_U"], stored)
    if steps.center_unembed:
        unembed["W_U"] = _center(unembed["W_U"], 1, stored)
        unembed["b_U"] = _center(unembed["b_U"], 0, stored)
    return head


def _whole_gain(norm: Params, steps: Steps) -> Params:
    return {**norm, "w": 1 + norm["w"]} if steps.offset else norm


def _fold(norm: Params, weight: Array, bias: Array, stored: jnp.dtype) -> tuple[Array, Array]:
    """Moves a norm's gain and bias into the matrix that reads it (contracted axis first)."""
    if "b" not in norm:  # an RMS norm, whose output keeps its mean
        return _scale(weight, norm["w"]), bias
    bias = bias + jnp.tensordot(norm["b"], weight, axes=1, precision="highest")
    return _center(_scale(weight, norm["w"]), 0, stored), bias


def _scale(weight: Array, gain: Float[Array, " d"]) -> Array:
    return weight * gain.reshape(-1, *[1] * (weight.ndim - 1))


def _center(x: Array, axis: int, stored: jnp.dtype) -> Array:
    """Subtracts the mean along ``axis``, except where it is rounding noise once ``x`` is stored."""
    info = jnp.finfo(stored)
    seen = jax.lax.reduce_precision(x, info.nexp, info.nmant)  # decide on what a second call would see
    spread = jnp.sqrt(jnp.mean(seen * seen, axis, keepdims=True))
    tolerance = spread * (8 * float(jnp.finfo(x.dtype).eps) + 4 * float(info.eps) / x.shape[axis] ** 0.5)
    mean = jnp.where(jnp.abs(jnp.mean(seen, axis, keepdims=True)) > tolerance, jnp.mean(x, axis, keepdims=True), 0)
    return x - mean
