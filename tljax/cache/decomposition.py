"""The whole residual stream as a sum of heads, neurons or MLPs, embeddings and biases."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from tljax.cache import access
from tljax.cache.heads import after_of, head_labels, head_names, head_parts
from tljax.cache.neurons import neuron_labels, neuron_names, neuron_parts, refuse_without_neurons
from tljax.cache.residual import embeddings, layer_outputs
from tljax.cache.slices import SliceInput
from tljax.cache.writers import After, Biases, Part, Pieces, read_parts
from tljax.modules.activations import scaled

if TYPE_CHECKING:
    from tljax.cache.activation_cache import ActivationCache


def biases(cache: "ActivationCache", n_attention: int, n_mlp: int) -> Biases:
    """Collects the biases of the first ``n_attention`` attentions and ``n_mlp`` MLPs, and of the norms after them."""
    cfg, model = cache.cfg, cache.model
    constant = jnp.zeros(cfg.d_model, cfg.jnp_dtype)
    through: list[tuple[Any, After]] = []
    written = [(layer, "attn", "b_O", "ln1_post") for layer in range(n_attention)]
    written += [(layer, "mlp", "b_out", "ln2_post") for layer in range(n_mlp)]
    for layer, part, name, norm in written:
        block, after = model.params["blocks"][layer], after_of(cache, layer, norm)
        if after is None:
            constant += scaled(block[part][name], cfg.residual_multiplier)
        else:
            through.append((block[part][name], after))
            if "b" in block[norm]:
                constant += scaled(block[norm]["b"], cfg.residual_multiplier)
    return Biases(constant, tuple(through), cache["hook_embed"])


@access.checked
def get_full_resid_decomposition(
    cache: "ActivationCache",
    layer: int | None = None,
    mlp_input: bool = False,
    expand_neurons: bool = True,
    apply_ln: bool = False,
    pos_slice: SliceInput = None,
    return_labels: bool = False,
    project_output_onto: Any = None,
) -> Any:
    """Decomposes the residual stream into a sum of heads, neurons (or MLPs), embeddings, and one row of biases.

    Args:
        layer: decompose the stream that enters this layer; ``None`` or ``-1`` means the final one.
        mlp_input: decompose the stream that enters the layer's MLP instead.
        expand_neurons: one row a neuron, with ``b_out`` among the biases; if ``False``, one row an MLP, ``b_out``
            included. Must be ``False`` for mixtures of experts.
        apply_ln: apply the norm that reads the stream there, with its cached scale; the rows then sum to its
            ``hook_normalized``.
        pos_slice: positions to keep, of each prompt's text; a number drops the axis.
        return_labels: also return ``["L0H0", …, "L0N0", … (or "0_mlp_out", …), "embed", "pos_embed", "bias"]``.
        project_output_onto: a direction ``[d_model]``, or several ``[d_model, direction]``; applied after the norm.

    Returns:
        ``[component, batch, pos, d_model]``, and the labels if asked for. A projection replaces ``d_model`` by
        ``direction``, or drops it for a single direction.
    """
    cfg, what = cache.cfg, "get_full_resid_decomposition"
    access.refuse_norms_of_the_stream(cfg, what)
    access.refuse_dictionaries(cfg, what)
    last = access.bounded_layer(cfg, layer, mlp_input)
    n_attention = last + (mlp_input and not cfg.parallel_attn_mlp)
    layers = range(0 if cfg.attn_only else last)
    if expand_neurons:
        refuse_without_neurons(cfg, layers, what)
    starts, mlps = embeddings(cfg), [] if expand_neurons else layer_outputs(cfg, last, False, "mlp")
    scale = access.scale_name(cfg, last, mlp_input) if apply_ln else None
    rows = [*mlps, *starts]
    names = [*head_names(cache, n_attention), *(neuron_names(cache, layers) if expand_neurons else ())]
    access.require(cache, [*names, *(name for _, name in rows), *([scale] if scale else [])], what)
    parts: list[Part] = [*head_parts(cache, n_attention), *(neuron_parts(cache, layers) if expand_neurons else ())]
    parts.append(Pieces(tuple(cache[name] for _, name in rows)))
    parts.append(biases(cache, n_attention, len(layers) if expand_neurons else 0))
    reader = access.reader_of(cache, last, mlp_input, apply_ln, access.directions(cfg, project_output_onto))
    taken = access.position_cut(cache, pos_slice, cache["hook_embed"])
    stack = read_parts(
        tuple(parts), reader, taken, None, cfg=cfg.computation, centred=apply_ln and access.centres(cfg, last)
    )  # fmt: skip
    stack = access.unprojected_axis(stack, project_output_onto)
    if not return_labels:
        return stack
    neurons = neuron_labels(layers, range(cfg.d_mlp or 0)) if expand_neurons else []
    return stack, [*head_labels(cache, n_attention), *neurons, *(label for label, _ in rows), "bias"]
