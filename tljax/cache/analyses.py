"""The analyses that ``ActivationCache`` offers as methods; each is a function of its own in a module of this room."""

import functools
from typing import TYPE_CHECKING, Any, cast

import jax

from tljax.cache import attribution, decomposition, heads, neurons, residual
from tljax.cache.slices import SliceInput
from tljax.checks import typed
from tljax.errors import CacheError

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache


_checked = functools.partial(typed, error=CacheError)


class CacheAnalyses:
    """The residual stream and the logits taken apart.

    All are pure functions of the cache and its model, and go through ``jax.jit`` and ``jax.vmap`` (over prompts) with
    both as arguments: ``jax.jit(lambda model, cache: cache.with_model(model).stack_head_results())(model, cache)``.
    """

    @_checked
    def stack_activation(self, activation_name: str, layer: int = -1, sublayer_type: str | None = None) -> jax.Array:
        """Stacks one activation over layers.

        Args:
            activation_name: short name, such as ``"resid_post"`` or ``"z"``.
            layer: stop before this layer; ``-1`` stacks every layer.
            sublayer_type: ``"ln1"``, ``"ln2"``, ``"attn"`` or ``"mlp"`` where the name alone is ambiguous.

        Returns:
            ``[layer, ...]``.
        """
        return residual.stack_activation(_cache(self), activation_name, layer, sublayer_type)

    @_checked
    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream at each depth. :meth:`logit_lens` takes it on to logits.

        Args:
            layer: up to the input of this layer; ``None`` or ``-1`` means the final residual stream too.
            incl_mid: also the stream between attention and MLP.
            apply_ln: normalise as the reader of the last row would: for the final layer each row goes through
                ``ln_final`` itself, otherwise the cached scale of that layer's norm is used for all rows.
            pos_slice: positions to keep, of each prompt's text; a number drops the axis.
            mlp_input: with ``layer``, also include the stream that enters its MLP.
            return_labels: also return ``["0_pre", "0_mid", …, "final_post"]``.

        Returns:
            ``[component, batch, pos, d_model]``, and the labels if asked for.
        """
        return residual.accumulated_resid(_cache(self), layer, incl_mid, apply_ln, pos_slice, mlp_input, return_labels)

    @_checked
    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What the embeddings, each attention and each MLP add to the residual stream; with ``mode="all"`` its sum.

        Args:
            layer: parts of the stream that enters this layer; ``None`` or ``-1`` means the final one.
            mlp_input: of the stream that enters its MLP instead: the layer's attention too, unless the two run in
                parallel and read the same (TransformerLens adds it there as well).
            mode: ``"all"`` (or ``"full"``), ``"attn"`` or ``"mlp"``.
            apply_ln: through the norm that reads the stream there, by its cached scale (:meth:`apply_ln_to_stack`).
            pos_slice: positions to keep, of each prompt's text; a number drops the axis.
            incl_embeds: the embeddings too.
            return_labels: also return ``["embed", "pos_embed", "0_attn_out", "0_mlp_out", …]``.

        Returns:
            ``[component, batch, pos, d_model]``, and the labels if asked for.
        """
        return residual.decompose_resid(
            _cache(self), layer, mlp_input, mode, apply_ln, pos_slice, incl_embeds, return_labels
        )  # fmt: skip

    def compute_head_results(self) -> "ActivationCache":
        """Returns the cache with every ``attn.hook_result`` ``[batch, pos, head, d_model]``: ``z`` times ``W_O``.

        A cache does not change: keep what is returned (TransformerLens adds to the cache itself). The stacks below need
        no such call, and are cheaper without: they need not hold every layer's results twice.
        """
        return heads.compute_head_results(_cache(self))

    @_checked
    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceInput = None,
        apply_ln: bool = False,
    ) -> Any:
        """What each head adds to the residual stream.

        That is its ``hook_result``, through the norm after attention where there is one (its cached scale and its
        weight) and times ``residual_multiplier``. TransformerLens stacks ``hook_result`` as it is, so that its heads do
        not add up to ``hook_attn_out`` in such models.

        Args:
            layer: the heads of the layers before this one; ``None`` or ``-1`` means all.
            return_labels: also return ``["L0H0", "L0H1", …]``.
            incl_remainder: a last row, ``"remainder"``: the stream that enters ``layer`` without the heads.
            pos_slice: positions to keep, of each prompt's text; a number drops the axis.
            apply_ln: through the norm that reads the stream at ``layer``, by its cached scale.

        Returns:
            ``[layer * head, batch, pos, d_model]``, and the labels if asked for.
        """
        return heads.stack_head_results(_cache(self), layer, return_labels, incl_remainder, pos_slice, apply_ln)

    @_checked
    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: SliceInput = None,
        pos_slice: SliceInput = None,
        project_output_onto: Any = None,
    ) -> jax.Array:
        """What each neuron of a layer adds to the residual stream: its activation times its row of ``W_out``.

        A norm after the MLP and ``residual_multiplier`` count, as for :meth:`stack_head_results`.

        Args:
            layer: the layer; negative numbers count from the end.
            neuron_slice: neurons to keep; a number drops the axis.
            pos_slice: positions to keep, of each prompt's text; a number drops the axis.
            project_output_onto: a direction ``[d_model]``, or several as columns ``[d_model, direction]``: their
                products with each neuron's output are returned, without making the outputs.

        Returns:
            ``[batch, pos, neuron, d_model]``; projected ``[batch, pos, neuron]``, or with an axis ``direction``.
        """
        return neurons.get_neuron_results(_cache(self), layer, neuron_slice, pos_slice, project_output_onto)

    @_checked
    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: SliceInput = None,
        neuron_slice: SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Any = None,
    ) -> Any:
        """What each neuron adds to the residual stream, :meth:`get_neuron_results` over layers.

        Args:
            layer: the neurons of the layers before this one; ``None`` or ``-1`` means all.
            pos_slice: positions to keep, of each prompt's text; a number drops the axis.
            neuron_slice: neurons of each layer to keep.
            return_labels: also return ``["L0N0", "L0N1", …]``.
            incl_remainder: a last row, ``"remainder"``: the stream that enters ``layer`` without these neurons.
            apply_ln: through the norm that reads the stream at ``layer``, by its cached scale.
            project_output_onto: a direction ``[d_model]``, or several ``[d_model, direction]``; applied after the norm.

        Returns:
            ``[layer * neuron, batch, pos, d_model]``, or without ``d_model`` (with ``direction``) when projected; and
            the labels if asked for. Without projection or ``pos_slice`` that is large.
        """
        return neurons.stack_neuron_results(
            _cache(self), layer, pos_slice, neuron_slice, return_labels, incl_remainder, apply_ln, project_output_onto
        )

    @_checked
    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        return_labels: bool = False,
        project_output_onto: Any = None,
    ) -> Any:
        """The residual stream as a sum: heads, neurons (or MLPs), embeddings, and one row of biases.

        Args:
            layer: parts of the stream that enters this layer; ``None`` or ``-1`` means the final one.
            mlp_input: of the stream that enters its MLP instead.
            expand_neurons: neurons, with ``b_out`` among the biases; otherwise whole MLPs, which keep theirs. Mixtures
                of experts need it off.
            apply_ln: through the norm that reads the stream there, by its cached scale; the sum is then its
                ``hook_normalized``.
            pos_slice: positions to keep, of each prompt's text; a number drops the axis.
            return_labels: also return ``["L0H0", …, "L0N0", … (or "0_mlp_out", …), "embed", "pos_embed", "bias"]``.
            project_output_onto: a direction ``[d_model]``, or several ``[d_model, direction]``; applied after the norm.

        Returns:
            ``[component, batch, pos, d_model]``, or without ``d_model`` (with ``direction``) when projected; and the
            labels if asked for.
        """
        return decomposition.get_full_resid_decomposition(
            _cache(self), layer, mlp_input, expand_neurons, apply_ln, pos_slice, return_labels, project_output_onto
        )

    @_checked
    def logit_attrs(
        self,
        residual_stack: Any,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        *,
        final_norm_weight: bool = True,
    ) -> jax.Array:
        """What each part of the final residual stream adds to the logit of a token, or to a difference of two logits.

        The parts of the whole stream add up: ``logit_attrs(get_full_resid_decomposition(), t).sum(0) + logit_bias(t)``
        is the logit of ``t``, before any soft cap.

        Args:
            residual_stack: ``[component, batch, pos, d_model]``, positions cut by ``pos_slice`` already.
            tokens: a string that is one token, an id, or ids ``[batch]`` or ``[batch, pos]``.
            incorrect_tokens: as many tokens, whose logits are subtracted.
            pos_slice: what was sliced out of the stack.
            batch_slice: prompts to keep; the stack may have been cut alike.
            has_batch_dim: ``False`` says that ``batch_slice`` took the batch axis out of the stack.
            final_norm_weight: multiply by the weight of ``ln_final`` where it is not folded into ``W_U``, as the model
                does. ``False`` leaves it out, as TransformerLens does: the attributions then do not add up.

        Returns:
            ``[component, batch, pos]``.
        """
        return attribution.logit_attrs(
            _cache(self),
            residual_stack,
            tokens,
            incorrect_tokens,
            pos_slice,
            batch_slice,
            has_batch_dim,
            final_norm_weight,
        )

    @_checked
    def logit_bias(self, tokens: Any, incorrect_tokens: Any = None) -> jax.Array:
        """The part of a logit, or of a difference of two, that no part of the residual stream makes.

        Returns:
            ``logits_multiplier * (b_U + ln_final.b @ W_U)`` at the tokens, in their shape.
        """
        return attribution.logit_bias(_cache(self), tokens, incorrect_tokens)

    @_checked
    def logit_lens(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The logits that each depth of the residual stream would give (nostalgebraist 2020, the logit lens).

        Each row of :meth:`accumulated_resid` goes through the model's own final norm, unembedding, multiplier and soft
        cap, so that the last row is the model's output.

        Args:
            layer, incl_mid, pos_slice, mlp_input, return_labels: as for :meth:`accumulated_resid`.

        Returns:
            ``[component, batch, pos, d_vocab_out]``, and the labels if asked for.
        """
        return attribution.logit_lens(_cache(self), layer, incl_mid, pos_slice, mlp_input, return_labels)

    @_checked
    def apply_ln_to_stack(
        self,
        residual_stack: jax.Array,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> jax.Array:
        """Normalises pieces of the residual stream as the norm that reads the whole did: by its cached scale.

        Args:
            residual_stack: ``[component, batch, pos, d_model]``, positions cut by ``pos_slice`` already.
            layer: the norm before this layer; ``None``, ``-1`` or ``n_layers`` means ``ln_final``.
            mlp_input: ``ln2`` of that layer instead of ``ln1``.
            pos_slice: what was sliced out of the stack.
            batch_slice: prompts to keep; the stack may have been cut alike.
            has_batch_dim: ``False`` says that ``batch_slice`` took the batch axis out of the stack.
            recompute_ln: normalise each row by its own scale through the model's ``ln_final``, its weight and bias
                included, instead. Only for the final layer.

        Returns:
            The stack, centred under a layer norm and divided; no weight and no bias is applied.
        """
        return residual.apply_ln_to_stack(
            _cache(self), residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )


def _cache(self: CacheAnalyses) -> "ActivationCache":
    return cast("ActivationCache", self)
