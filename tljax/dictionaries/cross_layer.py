"""Cross-layer transcoders: features read at one layer write to the MLP outputs of that layer and all later ones."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tljax.dictionaries.dictionary import Reconstruction, product
from tljax.dictionaries.formats.own import write_own_cross_layer
from tljax.dictionaries.maths.broadcasting import each
from tljax.dictionaries.maths.config import CrossLayerConfig
from tljax.dictionaries.stored import StoredSet
from tljax.errors import DictionaryError, FrozenModelError


@jax.tree_util.register_pytree_with_keys_class
class CrossLayerTranscoder(StoredSet):
    """Features that write to the MLP outputs of their own layer and of every later one.

    ``a_l = act(x_l W_enc[l] + b_enc[l])`` and ``y_w = b_dec[w] + sum_{l <= w} a_l W_dec[l][:, w - l]``.

    Args:
        layers: for each layer ``W_enc`` ``[d_in, d_sae]``, ``b_enc`` ``[d_sae]``, ``b_dec`` ``[d_in]``, ``W_dec``
            ``[d_sae, n_layers - layer, d_in]``, ``threshold`` ``[d_sae]`` with ``jumprelu``, and perhaps ``W_skip``
            ``[d_in, d_in]``, which adds ``x_w W_skip[w].T`` to ``y_w``.
        cfg: what it computes.

    Raises:
        DictionaryError: parameters are missing, unknown or of a wrong shape; lists them all.
    """

    _holds = "cross-layer transcoder"
    layers: tuple[dict[str, jax.Array], ...]
    cfg: CrossLayerConfig

    def __init__(self, layers: Sequence[Mapping[str, Any]], cfg: CrossLayerConfig) -> None:
        arrays = tuple({name: jnp.asarray(value) for name, value in layer.items()} for layer in layers)
        _check(arrays, cfg)
        self.__dict__.update(layers=arrays, cfg=cfg)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        return [(jax.tree_util.GetAttrKey("layers"), self.layers)], self.cfg

    @classmethod
    def tree_unflatten(cls, aux: CrossLayerConfig, children: Sequence[Any]) -> "CrossLayerTranscoder":
        transcoder = object.__new__(cls)
        transcoder.__dict__.update(layers=children[0], cfg=aux)
        return transcoder

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenModelError(f"A CrossLayerTranscoder cannot change in place (setting {name!r}): build a new one.")

    def __repr__(self) -> str:
        cfg = self.cfg
        return f"CrossLayerTranscoder({cfg.n_layers} layers, {cfg.d_in} -> {cfg.d_sae})"

    def encode_layer(self, activations: jax.Array, layer: int) -> jax.Array:
        """Computes a layer's features ``[..., d_sae]`` from what it reads, ``[..., d_in]``."""
        own = self.layers[layer]
        h = product(activations.astype(own["W_enc"].dtype), own["W_enc"])
        h = h + each(own["b_enc"], h)
        below = h <= (each(jnp.maximum(own["threshold"], 0), h) if self.cfg.jumprelu else 0)
        return jnp.where(below, 0, h)

    def encode(self, activations: jax.Array) -> jax.Array:
        """Computes features ``[layer, ..., d_sae]`` from what every layer reads, ``[layer, ..., d_in]``."""
        x = jnp.asarray(activations)
        if x.shape[0] != self.cfg.n_layers or x.shape[-1] != self.cfg.d_in:
            raise DictionaryError(
                f"Activations of shape {x.shape} do not fit {self!r}: [{self.cfg.n_layers}, ..., {self.cfg.d_in}]."
            )
        return jnp.stack([self.encode_layer(x[layer], layer) for layer in range(self.cfg.n_layers)])

    def decode_layer(self, features: Sequence[jax.Array] | jax.Array, layer: int) -> jax.Array:
        """Computes a layer's output ``[..., d_in]`` from the features of layers up to it, each ``[..., d_sae]``."""
        written = [
            product(features[source], self.layers[source]["W_dec"][:, layer - source]) for source in range(layer + 1)
        ]
        output = sum(written[1:], written[0])
        return output + each(self.layers[layer]["b_dec"], output)

    def decode(self, features: jax.Array) -> jax.Array:
        """Computes outputs ``[layer, ..., d_in]`` from features ``[layer, ..., d_sae]``."""
        return jnp.stack([self.decode_layer(features, layer) for layer in range(self.cfg.n_layers)])

    def skip_layer(self, activations: jax.Array, layer: int) -> jax.Array | None:
        """Returns what a layer's skip connection adds to its output, ``[..., d_in]``; ``None`` without one."""
        matrix = self.layers[layer].get("W_skip")
        return None if matrix is None else product(activations.astype(matrix.dtype), matrix.T)

    def __call__(self, activations: jax.Array) -> Reconstruction:
        """Encodes and decodes all layers, with their skip connections: ``y_hat, features = transcoder(x)``."""
        features = self.encode(activations)
        output = self.decode(features)
        skipped = [self.skip_layer(jnp.asarray(activations)[layer], layer) for layer in range(self.cfg.n_layers)]
        added = [part for part in skipped if part is not None]
        return Reconstruction(output + jnp.stack(added) if added else output, features)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes it to ``cfg.json`` and ``cross_layer_transcoder.safetensors``; :meth:`load` reads them."""
        write_own_cross_layer(Path(directory), jax.device_get(self.layers), self.cfg)


def _check(layers: Sequence[Mapping[str, jax.Array]], cfg: CrossLayerConfig) -> None:
    if len(layers) != cfg.n_layers:
        raise DictionaryError(f"Parameters of {len(layers)} layers were given for n_layers={cfg.n_layers}.")
    problems = []
    for number, layer in enumerate(layers):
        d, f = cfg.d_in, cfg.d_sae
        shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, cfg.n_layers - number, d), "b_dec": (d,)}
        shapes |= {"threshold": (f,)} if cfg.jumprelu else {}
        problems += [f"{name} of layer {number} is missing" for name in shapes if name not in layer]
        if "W_skip" in layers[0]:
            shapes["W_skip"] = (d, d)
            problems += [] if "W_skip" in layer else [f"W_skip of layer {number} is missing"]
        problems += [f"{name} of layer {number} is unknown" for name in layer if name not in shapes]
        problems += [
            f"{name} of layer {number} has shape {list(layer[name].shape)}, expected {list(shape)}"
            for name, shape in shapes.items()
            if name in layer and layer[name].shape != shape
        ]
    if problems:
        raise DictionaryError("The parameters do not fit: " + "; ".join(problems) + ".")
