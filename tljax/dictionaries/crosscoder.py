"""Crosscoders: one set of features for the activations of several layers or models."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tljax.dictionaries.dictionary import Reconstruction
from tljax.dictionaries.maths.activations import select
from tljax.dictionaries.maths.config import CrosscoderConfig
from tljax.errors import DictionaryError, FrozenModelError


@jax.tree_util.register_pytree_with_keys_class
class Crosscoder:
    """Features shared by several activations.

    ``f = act(sum_n x_n W_enc[n] + b_enc)``, and the reconstruction of ``x_n`` is ``f W_dec[:, n] + b_dec[n]``.

    Args:
        params: ``W_enc`` ``[n, d_in, d_sae]``, ``b_enc`` ``[d_sae]``, ``W_dec`` ``[d_sae, n, d_in]``, ``b_dec`` ``[n,
            d_in]``, with ``jumprelu`` ``threshold`` ``[d_sae]``; where inputs are standardised, ``mean`` ``[n, d_in]``
            and ``scale`` ``[n]``: a source is encoded as ``(x - mean) * scale``, and the reconstruction is undone.
        cfg: what it computes.

    Raises:
        DictionaryError: parameters are missing, unknown or of a wrong shape; lists them all.
    """

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
        """Computes features ``[..., d_sae]`` of activations ``[..., n, d_in]``."""
        h = self.pre_activations(activations)
        return select(h, self.cfg.selection, self.params.get("threshold"))

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
            x = (x - params["mean"]) * params["scale"][:, None]
        return jnp.einsum("...nd,ndf->...f", x, params["W_enc"], precision="highest") + params["b_enc"]

    def decode(self, features: jax.Array) -> jax.Array:
        """Computes reconstructions ``[..., n, d_in]`` from features ``[..., d_sae]``."""
        params = self.params
        output = jnp.einsum("...f,fnd->...nd", features, params["W_dec"], precision="highest") + params["b_dec"]
        return output / params["scale"][:, None] + params["mean"] if "mean" in params else output

    def __call__(self, activations: jax.Array) -> Reconstruction:
        """Encodes and decodes: ``x_hat [..., n, d_in], features = crosscoder(x)``."""
        features = self.encode(activations)
        return Reconstruction(self.decode(features), features)

    @property
    def decoder_norms(self) -> jax.Array:
        """Norm of each feature's direction in each source, ``[n, d_sae]``."""
        return jnp.linalg.norm(self.params["W_dec"], axis=-1).T

    def relative_norms(self, first: int = 0, second: int = 1) -> jax.Array:
        """Returns how far each feature belongs to one of two sources, ``[d_sae]``: 0 first only, 1 second only.

        ``((|d_second| - |d_first|) / max(|d_first|, |d_second|) + 1) / 2``, the measure of crosscoder model diffing.
        """
        one, other = self.decoder_norms[first], self.decoder_norms[second]
        return ((other - one) / jnp.maximum(jnp.maximum(one, other), 1e-12) + 1) / 2


def _check(params: Mapping[str, jax.Array], cfg: CrosscoderConfig) -> None:
    n, d, f = cfg.n_sources, cfg.d_in, cfg.d_sae
    shapes = {"W_enc": (n, d, f), "b_enc": (f,), "W_dec": (f, n, d), "b_dec": (n, d)}
    shapes |= {"threshold": (f,)} if cfg.architecture == "jumprelu" else {}
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
