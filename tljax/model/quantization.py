"""``quantize`` and ``dequantize``: a model whose large matrices are held in eight or four bits."""

from typing import TYPE_CHECKING, cast

import jax

from tljax.checkpoints.layout import flatten, parameter_axes, unflatten
from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.dictionary_params import dictionaries_in, with_dictionaries, without_dictionaries
from tljax.model.sharding import spread_like
from tljax.quantized_weight import as_floats, is_quantized
from tljax.typing import Params
from tljax.weights.quantization import WeightBits, quantize_parameters

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer


class QuantizationMethods:
    """Methods for models with weights in fewer bits."""

    cfg: HookedTransformerConfig
    params: Params

    @typed
    def quantize(self, bits: str, group_size: int | None = None) -> "HookedTransformer":
        """Returns the model with the large matrices of its blocks rounded to eight or four bits.

        These are attention's, the MLPs' and the experts' matrices; embeddings, unembedding, routers, norms and biases
        stay floats. Each block makes floats of its own while it runs, so everything works as before on the rounded
        weights: hooks, caches, sweeps, generation, derivatives with respect to activations. Derivatives with respect
        to the weights do not exist; weight processing and ``save_hf`` need :meth:`dequantize` first.

        Args:
            bits: ``"int8"`` or ``"int4"``, two to a byte. Weights are rounded to the nearest of 256 or 16 multiples of
                a scale, which is the largest magnitude among those that share it, over 127.5 or 7.5.
            group_size: how many weights that are multiplied into one output share a float32 scale. ``None``: with
                eight bits all of them, with four bits 128, or what divides: see :class:`tljax.weights.WeightBits`.

        Raises:
            QuantizationError: other bits, a group size that does not divide, or weights that are quantised already.

        >>> from tljax import HookedTransformer, HookedTransformerConfig
        >>> cfg = HookedTransformerConfig(d_model=64, n_heads=4, n_layers=2, n_ctx=6, d_vocab=5)
        >>> model = HookedTransformer(cfg)
        >>> model.quantize("int4").nbytes < model.quantize("int8").nbytes < model.nbytes
        True
        """
        form = WeightBits(bits, group_size)
        axes, before = parameter_axes(self.cfg), flatten(without_dictionaries(self.params))
        flat = quantize_parameters(before, axes, form)
        return self._with_own({path: spread_like(leaf, before[path]) for path, leaf in flat.items()})

    def dequantize(self) -> "HookedTransformer":
        """Returns the model with floats in place of its quantised weights, the rounded ones."""
        own = flatten(without_dictionaries(self.params))
        return self._with_own({path: spread_like(as_floats(leaf), leaf) for path, leaf in own.items()})

    @property
    def is_quantized(self) -> bool:
        """Whether weights are held in fewer bits."""
        return is_quantized(without_dictionaries(self.params))

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as they are held, those of spliced dictionaries included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    def _with_own(self, flat: dict[str, jax.Array]) -> "HookedTransformer":
        model = cast("HookedTransformer", self)
        params = with_dictionaries(unflatten(flat), dictionaries_in(self.params))
        return model._make(model.cfg, params, model._hooks, model._tokenizer)
