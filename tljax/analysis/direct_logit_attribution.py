"""Direct logit attribution: the direct contribution of each part of a model to the logit of an answer."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tljax.cache.access import position_cut
from tljax.cache.activation_cache import ActivationCache
from tljax.cache.attribution import logit_directions, token_ids
from tljax.cache.slices import SliceInput
from tljax.checks import typed, whole
from tljax.errors import InputError, nearest
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.activations import scaled

UNITS = ("component", "head", "neuron", "layer")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DirectLogitAttribution:
    """Contributions of a model's parts to a logit, or to a difference of two logits; a pytree.

    Attributes:
        attribution: ``[component, batch]`` at one position, ``[component, batch, pos]`` at several.
        token_mask: ``[batch, pos]``, ``False`` at padding, which :meth:`mean` leaves out; ``None`` without a mask.
        labels: names of the parts, in the order of ``component``.
        unit: the kind of part, as in :func:`direct_logit_attribution`.
    """

    attribution: Float[Array, "component *lead"]
    token_mask: Bool[Array, "batch pos"] | None = None
    labels: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    unit: str = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        parts = ", ".join(f"{label} {value:+.2f}" for label, value in self.top(3))
        return f"DirectLogitAttribution of {len(self.labels)} parts (unit={self.unit!r}), largest: {parts}"

    def mean(self) -> Float[Array, " component"]:
        """Averages each part's attribution over prompts and positions, leaving out padding."""
        rows = self.attribution.reshape(len(self.labels), -1)
        return rows.mean(axis=1, where=None if self.token_mask is None else self.token_mask.reshape(1, -1))

    @typed
    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Returns the ``k`` parts with the largest mean attribution and that mean, largest first."""
        return self._sorted(k, -1)

    @typed
    def bottom(self, k: int = 5) -> list[tuple[str, float]]:
        """Returns the ``k`` parts with the smallest mean attribution and that mean, most negative first."""
        return self._sorted(k, 1)

    def by_head(self) -> Float[Array, "layer head *lead"]:
        """Returns the heads' attributions as ``[layer, head, ...]``, for a heat map, without remainder and bias.

        Raises:
            InputError: the parts are not heads.
        """
        if self.unit != "head":
            raise InputError(f"by_head needs unit='head'; this is unit={self.unit!r}.")
        names = [label for label in self.labels if label.startswith("L")]
        n_layers = len({name.partition("H")[0] for name in names})
        return self.attribution[: len(names)].reshape(n_layers, -1, *self.attribution.shape[1:])

    def _sorted(self, k: int, sign: int) -> list[tuple[str, float]]:
        whole(k, "k", at_least=1)
        values = np.asarray(self.mean(), np.float64)
        return [(self.labels[n], float(values[n])) for n in np.argsort(sign * values, kind="stable")[:k]]


@typed
def direct_logit_attribution(
    model: HookedTransformer,
    input: Any = None,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    unit: str = "component",
    pos: SliceInput = -1,
    cache: ActivationCache | None = None,
) -> DirectLogitAttribution:
    """Decomposes a logit, or a difference of two logits, into the contributions of the model's parts.

    Each part's output goes through the final norm, whose scale is held fixed at the run's, and the unembedding. Except
    with ``unit="layer"``, the contributions sum to the logit (difference) before any soft cap. The row ``"bias"``,
    which does not come from the residual stream, is part of the sum.

    Args:
        model: the model.
        input: prompts, as the model takes them.
        answer_tokens: the answer: a string that is one token, an id, or one for each prompt.
        incorrect_tokens: as many tokens whose logits are subtracted.
        unit: ``"component"``: the embeddings, each layer's attention and MLP. ``"head"``: each head, and a remainder.
            ``"neuron"``: each neuron, and a remainder. ``"layer"``: the residual stream before and after each
            sublayer, as in the logit lens; these are running totals, without a bias row.
        pos: positions in each prompt's text at which the answer's logits are read; ``None`` keeps all.
        cache: the cache of a run to read instead of running ``input``.

    Raises:
        InputError: an unknown unit, no answer, neither or both of input and cache, answers that do not fit the prompts.
        UnknownHookError: the cache lacks an activation.
        CacheError: another model made it.
    """
    if unit not in UNITS:
        raise InputError(f"unit is one of {', '.join(map(repr, UNITS))}; got {unit!r}.{nearest(unit, UNITS)}")
    if answer_tokens is None:
        raise InputError("Give answer_tokens: the token whose logit is to be taken apart, such as ' Mary'.")
    if (input is None) == (cache is None):
        raise InputError("direct_logit_attribution reads a prompt or a cache: give input or cache=, one of them.")
    if cache is not None:
        kept = cache.with_model(model)
    else:
        _, kept = model.run_with_cache(input, names_filter=lambda name: name.endswith(_NEEDED[unit]))
    return _attributed(cast(ActivationCache, kept), answer_tokens, incorrect_tokens, unit, pos)


def _attributed(cache: ActivationCache, answer: Any, wrong: Any, unit: str, pos: SliceInput) -> DirectLogitAttribution:
    if unit == "neuron":
        values, labels = _neurons(cache, answer, wrong, pos)
    else:
        stack, labels = _parts(cache, unit, pos)
        values = cache.logit_attrs(stack, answer, wrong, pos_slice=pos)
    if unit != "layer":
        bias = jnp.broadcast_to(_bias(cache, answer, wrong, values.ndim - 1), (1, *values.shape[1:]))
        values, labels = jnp.concatenate([values, bias.astype(values.dtype)]), [*labels, "bias"]
    mask = cache.token_mask if values.ndim == 3 else None
    if mask is not None and (taken := position_cut(cache, pos, mask, -1)) is not None:
        mask = taken(mask, -1)
    return DirectLogitAttribution(attribution=values, token_mask=mask, labels=tuple(labels), unit=unit)


_STREAM = ("hook_resid_pre", "hook_resid_post", "hook_scale")
_NEEDED = {
    "component": (*_STREAM, "hook_embed", "hook_pos_embed", "hook_attn_out", "hook_mlp_out"),
    "head": (*_STREAM, "hook_z"),
    "neuron": (*_STREAM, "mlp.hook_post", "experts.hook_post"),
    "layer": (*_STREAM, "hook_resid_mid"),
}
"""Unit → endings of the names of the activations that it needs."""


def _parts(cache: ActivationCache, unit: str, pos: SliceInput) -> tuple[jax.Array, list[str]]:
    if unit == "component":
        return cache.decompose_resid(pos_slice=pos, return_labels=True)
    if unit == "layer":
        return cache.accumulated_resid(incl_mid=True, pos_slice=pos, return_labels=True)
    return cache.stack_head_results(pos_slice=pos, incl_remainder=True, return_labels=True)


def _neurons(cache: ActivationCache, answer: Any, wrong: Any, pos: SliceInput) -> tuple[jax.Array, list[str]]:
    """Returns each neuron's attribution and label, from its row of ``W_out`` projected onto the answers' directions.

    The neurons' output vectors are never built. If answers differ between prompts, each prompt keeps its own value.
    """
    ids, others = token_ids(cache.model, answer, wrong)
    if ids.ndim > 1:
        raise InputError(f"unit='neuron' takes one answer for each prompt, got tokens of shape {ids.shape}.")
    directions = jnp.atleast_2d(logit_directions(cache.model, ids, others)).astype(cache.model.W_U.dtype).T
    values, labels = cache.stack_neuron_results(
        -1, pos_slice=pos, return_labels=True, incl_remainder=True, apply_ln=True, project_output_onto=directions
    )
    if ids.ndim and values.shape[1] != len(ids):
        raise InputError(f"There are {values.shape[1]} prompts and {len(ids)} answers: give one answer, or one each.")
    chosen = jnp.arange(values.shape[1]) if ids.ndim else jnp.zeros(values.shape[1], jnp.int32)
    own = jnp.take_along_axis(values, chosen.reshape(1, -1, *(1,) * (values.ndim - 2)), axis=-1)[..., 0]
    return scaled(own, cache.cfg.logits_multiplier), labels


def _bias(cache: ActivationCache, answer: Any, wrong: Any, ndim: int) -> jax.Array:
    """Returns the logits' bias, ``[1, batch, pos]``, with axes of length 1 if all prompts share one token."""
    bias = cache.logit_bias(answer, wrong)
    return bias.reshape(1, *bias.shape, *(1,) * (ndim - bias.ndim))
