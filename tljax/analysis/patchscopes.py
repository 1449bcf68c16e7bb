"""Patchscopes (Ghandeharioun et al. 2024): a hidden state patched into a prompt that asks what it encodes."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from tljax import checks
from tljax.analysis.logit_lens import LensReadout, readout
from tljax.checks import typed
from tljax.errors import InputError
from tljax.generation.methods import GenerateOptions
from tljax.hooks.interventions import Replace
from tljax.hooks.splices import value_after
from tljax.model.hooked_transformer import HookedTransformer
from tljax.text.batch import Batch
from tljax.text.inputs import texts_in


def identity_prompt(words: Sequence[str] = ("cat", "1135", "hello"), slot: str = "?") -> str:
    """Returns a few-shot prompt that repeats words; a hidden state is patched in at its last token.

    >>> identity_prompt()
    'cat->cat; 1135->1135; hello->hello; ?'
    """
    return "; ".join([*(f"{word}->{word}" for word in words), slot])


@typed
def patchscope(
    model: HookedTransformer,
    source: Any,
    target: Any,
    *,
    source_pos: int = -1,
    target_pos: int = -1,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    mapping: Callable[[jax.Array], jax.Array] | None = None,
    source_model: HookedTransformer | None = None,
    targets: Any = None,
    top_k: int = 5,
) -> LensReadout:
    """Predicts the token after the target prompt, with each source layer's output patched into each target layer.

    A source layer's output at ``source_pos`` (``resid_post``) replaces a target layer's output at ``target_pos``. The
    prediction is read at the target's last token.

    Args:
        model: the model that runs the target prompt.
        source: the prompt whose hidden states are read, one text or its tokens.
        target: the prompt that asks about them, one text or its tokens, such as :func:`identity_prompt`.
        source_pos, target_pos: positions; negative numbers count from the end.
        source_layers, target_layers: layers, whose outputs (``resid_post``) are read and replaced; by default all.
        mapping: maps the source's residual stream ``[source_layer, d_model]`` to the target's; by default none.
        source_model: the model that runs the source prompt; by default ``model``.
        targets, top_k: as in :func:`~tljax.analysis.readout`.

    Returns:
        The readout of the target's last token, ``[source_layer, target_layer]``.

    Raises:
        InputError: more than one prompt, positions or layers out of range, states that do not fit the target model.
    """
    states = _source_states(source_model or model, source, source_pos, source_layers, mapping)
    tokens, hooks = _patched(model, target, target_pos, target_layers, states)
    last = value_after(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", model.cfg.splices)
    ends = []
    for hook in hooks:
        _, cache = model.with_hooks([hook]).run_with_cache(tokens, return_type=None, names_filter=last, pos_slice=-1)
        ends.append(cache[last][:, 0])
    return readout(model, jnp.stack(ends, axis=1), targets, top_k)


@typed
def patchscope_generate(
    model: HookedTransformer,
    source: Any,
    target: Any,
    *,
    source_pos: int = -1,
    target_pos: int = -1,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    mapping: Callable[[jax.Array], jax.Array] | None = None,
    source_model: HookedTransformer | None = None,
    max_new_tokens: int = 10,
    **options: Unpack[GenerateOptions],
) -> list[list[str]]:
    """Continues the target prompt, with each source layer's output patched into each target layer.

    All source layers run as one batch.

    Args:
        model, source, target, source_pos, target_pos, source_layers, target_layers, mapping, source_model: as in
            :func:`patchscope`.
        max_new_tokens: largest number of new tokens.
        **options: options of ``model.generate``; by default ``do_sample=False``.

    Returns:
        The new text, ``[source_layer][target_layer]``.
    """
    states = _source_states(source_model or model, source, source_pos, source_layers, mapping)
    tokens, hooks = _patched(model, target, target_pos, target_layers, states)
    chosen: dict[str, Any] = {"do_sample": False, "verbose": False, **options}
    by_target = []
    for hook in hooks:
        whole = model.generate(tokens, max_new_tokens, fwd_hooks=[hook], return_type="tokens", **chosen)
        by_target.append([_text(model, row) for row in np.asarray(whole)[:, tokens.shape[1] :]])
    return [list(texts) for texts in zip(*by_target, strict=True)]


def _text(model: HookedTransformer, ids: np.ndarray) -> str:
    """Decodes new tokens, without special tokens."""
    return model.tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def _source_states(
    model: HookedTransformer,
    source: Any,
    pos: int,
    layers: Sequence[int] | None,
    mapping: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """Returns the layers' outputs at a position, ``[source_layer, d_model]``, mapped if there is a mapping."""
    tokens = _one_prompt(model, source, "source")
    _check_pos("source_pos", pos, tokens.shape[1])
    names = [f"blocks.{n}.hook_resid_post" for n in _chosen(model, layers, "source_layers")]
    _, cache = model.run_with_cache(tokens, return_type=None, names_filter=names, pos_slice=pos)
    states = jnp.stack([cache[name][0, 0] for name in names])
    return states if mapping is None else mapping(states)


def _patched(
    model: HookedTransformer, target: Any, pos: int, layers: Sequence[int] | None, states: jax.Array
) -> tuple[jax.Array, list[tuple[str, Replace]]]:
    """Returns the target prompt repeated for each source state, and for each target layer the patching hook."""
    tokens = _one_prompt(model, target, "target")
    pos = _check_pos("target_pos", pos, tokens.shape[1])
    chosen = _chosen(model, layers, "target_layers")
    if states.ndim != 2 or states.shape[1] != model.cfg.d_model:
        raise InputError(
            f"The source states have shape {states.shape}; the target model takes [source_layer, "
            f"d_model={model.cfg.d_model}]. Give a mapping= from one to the other."
        )
    put = Replace(states, pos=pos)
    return jnp.repeat(tokens, len(states), axis=0), [(f"blocks.{n}.hook_resid_post", put) for n in chosen]


def _one_prompt(model: HookedTransformer, prompt: Any, what: str) -> jax.Array:
    if isinstance(prompt, Batch):
        tokens = prompt.row(0)[None] if len(prompt) == 1 else prompt.tokens
    else:
        tokens = (
            model.to_tokens(prompt, truncate=False)
            if texts_in(prompt) is not None
            else jnp.atleast_2d(jnp.asarray(prompt))
        )
    if tokens.shape[0] != 1:
        raise InputError(f"The {what} must be one prompt, got {tokens.shape[0]}.")
    return tokens


def _chosen(model: HookedTransformer, layers: Sequence[int] | None, what: str) -> list[int]:
    return list(checks.layers(layers, model.cfg.n_layers, what))


def _check_pos(name: str, pos: int, length: int) -> int:
    if not -length <= pos < length:
        raise InputError(f"{name}={pos} is out of range: the prompt has {length} tokens.")
    return pos % length
