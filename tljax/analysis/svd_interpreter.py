"""Singular vectors of weights, projected onto the vocabulary (Millidge and Black 2022)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tljax.checks import typed
from tljax.errors import ConfigError, InputError, nearest
from tljax.model.hooked_transformer import HookedTransformer
from tljax.modules.norm import norm_gain

VECTOR_TYPES = ("OV", "w_in", "w_out")


class SVDInterpreter:
    """Singular vectors of a model's weights as logits, as in TransformerLens's ``SVDInterpreter``.

    Args:
        model: a model; best with processed weights.
    """

    def __init__(self, model: HookedTransformer) -> None:
        self.model = model
        self.cfg = model.cfg

    @typed
    def get_singular_vectors(
        self, vector_type: str, layer_index: int, num_vectors: int = 10, head_index: int | None = None
    ) -> Float[Array, "d_vocab 1 num_vectors"]:
        """Projects the largest singular vectors of a weight matrix, on its residual-stream side, onto the unembedding.

        Args:
            vector_type: ``"OV"``: what a head writes. ``"w_in"``: what the neurons of a layer read, the gain of ``ln2``
                included where it is not folded in. ``"w_out"``: what they write.
            layer_index: the layer.
            num_vectors: how many vectors, largest singular value first.
            head_index: the head, for ``"OV"``.

        Returns:
            ``[d_vocab, 1, num_vectors]``. A singular vector's sign is arbitrary; here its largest logit is positive.

        Raises:
            InputError: an unknown type, a layer or head that is not there, more vectors than the matrix has.
            ConfigError: the model has no such matrix.
        """
        if vector_type not in VECTOR_TYPES:
            raise InputError(
                f"vector_type is one of {', '.join(map(repr, VECTOR_TYPES))}; got {vector_type!r}."
                f"{nearest(vector_type, VECTOR_TYPES)}"
            )
        _check_index("layer_index", layer_index, self.cfg.n_layers)
        if vector_type == "OV":
            if head_index is None:
                raise InputError("'OV' is a matrix of one head: give head_index.")
            _check_index("head_index", head_index, self.cfg.n_heads)
            vectors = self.model.blocks[layer_index].attn.OV[head_index].V.T
        else:
            matrix = self._w_in(layer_index) if vector_type == "w_in" else self._mlp(layer_index).W_out
            vectors = jnp.linalg.svd(_wide(matrix), full_matrices=False)[2]
        if not 1 <= num_vectors <= len(vectors):
            raise InputError(f"num_vectors={num_vectors}: this matrix has 1 to {len(vectors)} singular vectors.")
        logits = jnp.matmul(vectors[:num_vectors], _wide(self.model.W_U), precision="highest")
        largest = jnp.take_along_axis(logits, jnp.abs(logits).argmax(axis=1)[:, None], axis=1)
        return (logits * jnp.where(largest < 0, -1.0, 1.0).astype(logits.dtype)).T[:, None]

    def _mlp(self, layer: int) -> Any:
        if self.cfg.attn_only:
            raise ConfigError("This model is attention-only: it has no w_in and w_out.")
        if self.cfg.layer_kind(layer).experts:
            raise ConfigError(
                f"The MLP of layer {layer} is a mixture of experts, each with matrices of its own: take the singular "
                f"vectors of model.blocks[{layer}].mlp.experts.W_in[expert]."
            )
        return self.model.blocks[layer].mlp

    def _w_in(self, layer: int) -> jax.Array:
        read = self._mlp(layer).W_in.T
        gain = norm_gain(self.cfg, self.model.params["blocks"][layer].get("ln2", {}))
        return read if gain is None or not self.cfg.has_norms_before else read * gain.astype(read.dtype)[None]


def _check_index(name: str, index: int, size: int) -> None:
    if not 0 <= index < size:
        raise InputError(f"{name}={index} is out of range: 0 to {size - 1}.")


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
