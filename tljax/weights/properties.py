"""Weights by TransformerLens's names and shapes, stacked over layers."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from tljax.checks import typed
from tljax.errors import ConfigError
from tljax.modules.activations import scaled
from tljax.numerics import matmul_precision
from tljax.offload import abstract
from tljax.quantized_weight import as_floats, is_quantized_weight
from tljax.weights import circuits
from tljax.weights.factored_matrix import FactoredMatrix

if TYPE_CHECKING:
    from tljax.config import HookedTransformerConfig

_HEADS_SECOND = ("W_Q", "W_K", "W_V", "W_Q_up", "W_K_up", "W_V_up")


def public_shape(name: str, weight: Any) -> jax.Array:
    """Returns a stored parameter in TransformerLens's layout: ``W_Q``, ``W_K``, ``W_V`` ``[head, d_model, d_head]``.

    Of a quantised weight these are floats, made anew at each call.
    """
    floats = as_floats(weight)
    return jnp.moveaxis(floats, 1, 0) if name in _HEADS_SECOND else floats


def _refuse_latent(cfg: "HookedTransformerConfig", name: str) -> None:
    """Refuses weights that latent attention has only as factors, with a norm between them."""
    letter = name[2]
    if letter == "O" or (letter == "Q" and cfg.q_lora_rank is None):
        return
    if letter == "Q":
        parts = "W_Q_down [d_model, q_lora_rank], b_Q_down, q_latent_norm's w, W_Q_up [head, q_lora_rank, d_head]"
    else:
        parts = "W_KV_down [d_model, kv_lora_rank], b_KV_down, kv_latent_norm's w, "
        parts += f"W_{letter}_up [head, kv_lora_rank, …]"
        parts += ", and W_K_rot [d_model, rotary_dim] for what rotates" if letter == "K" else ""
    raise ConfigError(
        f"This model has no {name}: a normalised latent (kv_lora_rank={cfg.kv_lora_rank}, "
        f"q_lora_rank={cfg.q_lora_rank}) stands between the residual stream and the heads, so that they are not linear "
        f"in it. Read the factors from model.blocks[layer].attn: {parts}."
    )


class WeightProperties:
    """The weight properties of a model; ``L`` layers, ``H`` heads, grouped key/value heads repeated to ``H``."""

    cfg: "HookedTransformerConfig"
    params: dict[str, Any]

    def _block_weight(self, part: str, name: str) -> jax.Array:
        cfg = self.cfg
        if part == "mlp" and cfg.attn_only:
            raise ConfigError(f"This model is attention-only: it has no {name}.")
        if part == "mlp" and cfg.num_experts is not None:
            raise ConfigError(
                f"This model has experts, so no {name} that all layers share: read "
                f"model.blocks[layer].mlp.experts.{name}, [expert, …], or model.params['blocks'][layer]['mlp']."
            )
        if part == "attn" and cfg.kv_lora_rank is not None:
            _refuse_latent(cfg, name)
        weights = [public_shape(name, block[part][name]) for block in self.params["blocks"]]
        if not weights:
            raise ConfigError(f"This model has no layers, so no {name}.")
        stacked = jnp.stack(weights)
        if part == "attn" and name[2] in "KV" and cfg.kv_heads != cfg.n_heads:
            stacked = jnp.repeat(stacked, cfg.n_heads // cfg.kv_heads, axis=1)
        return stacked

    @property
    def W_E(self) -> jax.Array:
        """Token embedding ``[d_vocab, d_model]``, times ``cfg.embedding_multiplier``: what ``hook_embed`` holds."""
        embed = self.params["embed"]
        rows = scaled(embed["W_E"], self.cfg.embedding_multiplier)
        return self._joined(rows, embed["W_proj"]) if "W_proj" in embed else rows

    @property
    def W_pos(self) -> jax.Array:
        """Position embedding ``[n_ctx, d_model]``."""
        if "pos_embed" not in self.params:
            raise ConfigError(
                f"This model has no W_pos: its positions are {self.cfg.positional_embedding_type!r}, not learned."
            )
        return self.params["pos_embed"]["W_pos"]

    @property
    def W_E_pos(self) -> jax.Array:
        """Token and position embeddings, one above the other, ``[d_vocab + n_ctx, d_model]``."""
        return jnp.concatenate([self.W_E, self.W_pos])

    @property
    def W_U(self) -> jax.Array:
        """Unembedding ``[d_model, d_vocab_out]``."""
        unembed = self.params["unembed"]
        return self._joined(unembed["W_proj"], unembed["W_U"]) if "W_proj" in unembed else unembed["W_U"]

    def _joined(self, first: jax.Array, second: jax.Array) -> jax.Array:
        with matmul_precision(self.cfg):
            return first @ second

    @property
    def b_U(self) -> jax.Array:
        """Unembedding bias ``[d_vocab_out]``."""
        return self.params["unembed"]["b_U"]

    @property
    def W_Q(self) -> jax.Array:
        """Query weights ``[L, H, d_model, d_head]``."""
        return self._block_weight("attn", "W_Q")

    @property
    def W_K(self) -> jax.Array:
        """Key weights ``[L, H, d_model, d_head]``."""
        return self._block_weight("attn", "W_K")

    @property
    def W_V(self) -> jax.Array:
        """Value weights ``[L, H, d_model, d_head]``."""
        return self._block_weight("attn", "W_V")

    @property
    def W_O(self) -> jax.Array:
        """Output weights ``[L, H, d_head, d_model]``."""
        return self._block_weight("attn", "W_O")

    @property
    def b_Q(self) -> jax.Array:
        """Query biases ``[L, H, d_head]``."""
        return self._block_weight("attn", "b_Q")

    @property
    def b_K(self) -> jax.Array:
        """Key biases ``[L, H, d_head]``."""
        return self._block_weight("attn", "b_K")

    @property
    def b_V(self) -> jax.Array:
        """Value biases ``[L, H, d_head]``."""
        return self._block_weight("attn", "b_V")

    @property
    def b_O(self) -> jax.Array:
        """Attention output biases ``[L, d_model]``."""
        return self._block_weight("attn", "b_O")

    @property
    def W_in(self) -> jax.Array:
        """MLP input weights ``[L, d_model, d_mlp]``."""
        return self._block_weight("mlp", "W_in")

    @property
    def W_gate(self) -> jax.Array | None:
        """MLP gate weights ``[L, d_model, d_mlp]``, or ``None`` when the MLP is not gated."""
        return self._block_weight("mlp", "W_gate") if self.cfg.gated_mlp else None

    @property
    def b_gate(self) -> jax.Array | None:
        """MLP gate biases ``[L, d_mlp]``, or ``None`` where the gate has none (``cfg.gated_mlp_bias`` is off)."""
        return self._block_weight("mlp", "b_gate") if self.cfg.gated_mlp_bias else None

    @property
    def W_out(self) -> jax.Array:
        """MLP output weights ``[L, d_mlp, d_model]``."""
        return self._block_weight("mlp", "W_out")

    @property
    def b_in(self) -> jax.Array:
        """MLP input biases ``[L, d_mlp]``."""
        return self._block_weight("mlp", "b_in")

    @property
    def b_out(self) -> jax.Array:
        """MLP output biases ``[L, d_model]``."""
        return self._block_weight("mlp", "b_out")

    @property
    def QK(self) -> FactoredMatrix:
        """Query-key matrices ``W_Q W_K^T``, ``[L, H, d_model, d_model]``, query side first: what each head attends to.

        Biases are left out, and rotary positions are taken as if query and key were at the same position.
        """
        return circuits.head_circuit(self, self.cfg, "QK")

    @property
    def OV(self) -> FactoredMatrix:
        """Output-value matrices ``W_V W_O``, ``[L, H, d_model, d_model]``, source side first: what each head moves."""
        return circuits.head_circuit(self, self.cfg, "OV")

    @typed
    def all_composition_scores(self, mode: str) -> jax.Array:
        """Scores how strongly each head's output reaches the input of each later head (Elhage et al. 2021).

        Use processed weights: the scores leave out biases and the gains of norms.

        Args:
            mode: ``"Q"``, ``"K"`` or ``"V"``: the input through which the later head reads.

        Returns:
            ``[L, H, L, H]``, ``|OV · M| / (|OV| |M|)`` with ``M`` the later head's ``QK``, ``QK^T`` or ``OV``; 0 unless
            the first head's layer comes before the second's.

        Raises:
            InputError: another mode.
            ConfigError: the heads have no such matrices.
        """
        return circuits.all_composition_scores(self, mode)

    @typed
    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> jax.Array:
        """Sums what the biases of attention and MLPs have added to the residual stream at the input of a layer.

        Args:
            layer: 0 (nothing) to ``n_layers`` (everything).
            mlp_input: sum up to the input of this layer's MLP, which adds the layer's ``b_O`` (not in parallel blocks,
                whose MLP reads what attention reads).
            include_mlp_biases: include the ``b_out`` of MLPs; an attention-only model has none.

        Returns:
            ``[d_model]``, times ``cfg.residual_multiplier``.

        Raises:
            InputError: no such layer, or no MLP there.
            ConfigError: what the biases add depends on the input (norms after attention and MLP, experts).
        """
        return circuits.accumulated_bias(self.cfg, self.params, layer, mlp_input, include_mlp_biases)

    @property
    def n_params_total(self) -> int:
        """Number of parameters, embeddings and biases included; scales of quantised weights do not count."""
        leaves = jax.tree.leaves(abstract(self.params), is_leaf=is_quantized_weight)
        return sum(leaf.size for leaf in leaves)

    def all_head_labels(self) -> list[str]:
        """Returns ``["L0H0", "L0H1", …]``."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]
