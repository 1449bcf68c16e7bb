"""Crosscoders: one set of features for the activations of several layers or models."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tljax.dictionaries.dictionary import Reconstruction
from tljax.dictionaries.formats.own import write_own_crosscoder
from tljax.dictionaries.maths.activations import select, selected
from tljax.dictionaries.maths.broadcasting import each
from tljax.dictionaries.maths.config import CrosscoderConfig
from tljax.dictionaries.stored import StoredSet
from tljax.errors import DictionaryError, FrozenModelError


@jax.tree_util.register_pytree_with_keys_class
class Crosscoder(StoredSet):
    """Features shared by several activations.

    ``f = act(sum_n x_n W_enc[n] + b_enc)``, and the reconstruction of ``x_n`` is ``f W_dec[:, n] + b_dec[n]``.

    Args:
        params: ``W_enc`` ``[n, d_in, d_sae]``, ``b_enc`` ``[d_sae]``, ``W_dec`` ``[d_sae, n, d_in]``, ``b_dec`` ``[n,
            d_in]``, with ``jumprelu`` ``threshold`` ``[d_sae]`` (``[n, d_sae]`` where
            ``code_normalization="decoupled"``); where inputs are standardised, ``mean`` ``[n, d_in]`` and ``scale``
            ``[n]``: a source is encoded as ``(x - mean) * scale``, and the reconstruction is undone.
        cfg: what it computes.

    Raises:
        DictionaryError: parameters are missing, unknown or of a wrong shape; lists them all.
    """

    _holds = "crosscoder"
    params: dict[str, jax.Array]
    cfg: CrosscoderConfig

    def __init__(self, params: Mapping[str, Any], cfg: CrosscoderConfig) -> None:
        arrays = {name: jnp.asarray(value) for name, value in params.items()}
        _check(arrays, cfg)
        self.__dict__.update(params=arrays, cfg=cfg)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        return [(jax.tree_util.GetAttrKey("params"), self.params)], self.cfg

    @classmethod
    def tree_unflatten(cls, aux: CrosscoderConfig, children: Sequence[Any]) -> "Crosscoder":
        crosscoder = object.__new__(cls)
        crosscoder.__dict__.update(params=children[0], cfg=aux)
        return crosscoder

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenModelError(f"A Crosscoder cannot change in place (setting {name!r}): build a new one.")

    def __repr__(self) -> str:
        cfg = self.cfg
        return f"Crosscoder({cfg.architecture}, {cfg.n_sources} x {cfg.d_in} -> {cfg.d_sae})"

    def encode(self, activations: jax.Array) -> jax.Array:
        """Computes features ``[..., d_sae]`` of activations ``[..., n, d_in]``.

        With ``code_normalization="decoupled"`` features ``[..., n, d_sae]``: those of source ``i`` reconstruct it.
        """
        h, cfg = self.pre_activations(activations), self.cfg
        if cfg.code_normalization == "none":
            return select(h, cfg.selection, self.params.get("threshold"))
        features = jax.nn.relu(h)
        norms, threshold = self.code_norms, self.params.get("threshold")
        if cfg.code_normalization != "decoupled":
            return jnp.where(selected(features * each(norms, features), cfg.selection, threshold), features, 0)
        masks = [
            selected(features * each(norms[n], features), cfg.selection, None if threshold is None else threshold[n])
            for n in range(cfg.n_sources)
        ]  # of the whole batch for each source alone
        return jnp.where(jnp.stack(masks, axis=-2), features[..., None, :], 0)

    def pre_activations(self, activations: jax.Array) -> jax.Array:
        """Computes pre-activations ``[..., d_sae]`` of activations ``[..., n, d_in]``."""
        cfg, params = self.cfg, self.params
        x = jnp.asarray(activations)
        if x.shape[-2:] != (cfg.n_sources, cfg.d_in):
            raise DictionaryError(
                f"Activations of shape {x.shape} do not fit {self!r}: the last axes need [{cfg.n_sources}, {cfg.d_in}]."
            )
        x = x.astype(params["W_enc"].dtype)
        if "mean" in params:
            x = (x - each(params["mean"], x)) * each(params["scale"][:, None], x)
        h = jnp.einsum("...nd,ndf->...f", x, params["W_enc"], precision="highest")
        return h + each(params["b_enc"], h)

    def decode(self, features: jax.Array) -> jax.Array:
        """Computes reconstructions ``[..., n, d_in]`` from features ``[..., d_sae]``, or as ``encode`` returns them."""
        params, cfg = self.params, self.cfg
        expected = (cfg.n_sources, cfg.d_sae) if cfg.code_normalization == "decoupled" else (cfg.d_sae,)
        if features.shape[-len(expected) :] != expected:
            raise DictionaryError(f"Features of shape {features.shape} do not fit {self!r}: [..., {list(expected)}].")
        axes = "...nf,fnd->...nd" if cfg.code_normalization == "decoupled" else "...f,fnd->...nd"
        output = jnp.einsum(axes, features, params["W_dec"], precision="highest")
        output = output + each(params["b_dec"], output)
        if "mean" not in params:
            return output
        return output / each((params["scale"] + cfg.scale_eps)[:, None], output) + each(params["mean"], output)

    def __call__(self, activations: jax.Array) -> Reconstruction:
        """Encodes and decodes: ``x_hat [..., n, d_in], features = crosscoder(x)``."""
        features = self.encode(activations)
        return Reconstruction(self.decode(features), features)

    @property
    def decoder_norms(self) -> jax.Array:
        """Norm of each feature's direction in each source, ``[n, d_sae]``."""
        return jnp.linalg.norm(self.params["W_dec"], axis=-1).T

    @property
    def code_norms(self) -> jax.Array:
        """What features are multiplied by where they are selected: ``[d_sae]``, or ``[n, d_sae]`` if decoupled."""
        norms, cfg = self.decoder_norms, self.cfg
        together = jnp.linalg.norm(norms, axis=0)
        match cfg.code_normalization:
            case "none":
                return jnp.ones_like(together)
            case "crosscoder":
                return norms.sum(axis=0)
            case "sae":
                return together
            case "mixed":
                return cfg.alpha_sae * together + cfg.alpha_cc * norms.sum(axis=0)
            case "decoupled":
                return norms

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the crosscoder to ``cfg.json`` and ``crosscoder.safetensors``; :meth:`load` reads them."""
        write_own_crosscoder(Path(directory), jax.device_get(self.params), self.cfg)

    def relative_norms(self, first: int = 0, second: int = 1) -> jax.Array:
        """Returns how far each feature belongs to one of two sources, ``[d_sae]``: 0 first only, 1 second only.

        ``((|d_second| - |d_first|) / max(|d_first|, |d_second|) + 1) / 2``, the measure of crosscoder model diffing.
        """
        one, other = self.decoder_norms[first], self.decoder_norms[second]
        return ((other - one) / jnp.maximum(jnp.maximum(one, other), 1e-12) + 1) / 2


def _check(params: Mapping[str, jax.Array], cfg: CrosscoderConfig) -> None:
    n, d, f = cfg.n_sources, cfg.d_in, cfg.d_sae
    shapes = {"W_enc": (n, d, f), "b_enc": (f,), "W_dec": (f, n, d), "b_dec": (n, d)}
    if cfg.architecture == "jumprelu":
        shapes["threshold"] = (n, f) if cfg.code_normalization == "decoupled" else (f,)
    optional = {"mean": (n, d), "scale": (n,)}
    problems = [f"{name} {list(shape)} is missing" for name, shape in shapes.items() if name not in params]
    if ("mean" in params) != ("scale" in params):
        problems.append("mean and scale go together")
    known = shapes | optional
    stacked = params["b_enc"].shape[:-1] if "b_enc" in params else ()
    for name, array in params.items():
        if name not in known:
            problems.append(f"{name} is unknown")
        elif array.shape != (*stacked, *known[name]):
            problems.append(f"{name} has shape {list(array.shape)}, expected {[*stacked, *known[name]]}")
    if problems:
        raise DictionaryError(
            f"The parameters do not fit n_sources={n}, d_in={d}, d_sae={f}: " + "; ".join(problems) + "."
        )
