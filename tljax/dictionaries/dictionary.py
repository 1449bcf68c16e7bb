"""``Dictionary``: a sparse autoencoder or transcoder as a frozen pytree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tljax.dictionaries.maths.activations import select
from tljax.dictionaries.maths.broadcasting import each
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.dictionaries.maths.matching_pursuit import pursue
from tljax.dictionaries.maths.normalization import UNCHANGED, Factors, depends_on_input, normalize
from tljax.dictionaries.maths.temporal import encode_temporal
from tljax.dictionaries.stored import StoredDictionary
from tljax.errors import DictionaryError, FrozenModelError

At = Callable[[str, jax.Array], jax.Array]
"""Function of a point's name and its value that returns the value to continue with."""


def _unhooked(name: str, value: jax.Array) -> jax.Array:
    return value


class Reconstruction(NamedTuple):
    """What a dictionary returns when it is called.

    Attributes:
        reconstruction: ``[..., d_out]``, shaped like the input where heads are merged.
        features: ``[..., d_sae]``.
    """

    reconstruction: jax.Array
    features: jax.Array


class TopFeatures(NamedTuple):
    """The strongest features of each token, strongest first.

    Attributes:
        values: ``[..., k]``; 0 where fewer features are active.
        indices: ``[..., k]``, the features' numbers.
    """

    values: jax.Array
    indices: jax.Array


class Encoded(NamedTuple):
    """Features with what decoding needs to know of the input.

    Attributes:
        features: ``[..., d_sae]``.
        factors: what undoes the input's normalisation.
        predicted: features that earlier tokens predict, of temporal dictionaries; ``None`` for all others.
    """

    features: jax.Array
    factors: Factors
    predicted: jax.Array | None


@jax.tree_util.register_pytree_with_keys_class
class Dictionary(StoredDictionary):
    """A sparse autoencoder or transcoder: features of an activation, and a reconstruction from them.

    The object is immutable and a pytree whose leaves are its parameters and ``sparsity``: it goes through ``jax.jit``,
    ``jax.grad``, ``jax.vmap`` (a stack of dictionaries: every leaf with one more leading axis) and ``jax.device_put``.

    Args:
        params: arrays by SAELens's names: ``W_enc`` ``[d_in, d_sae]``, ``b_enc`` ``[d_sae]``, ``W_dec`` ``[d_sae,
            d_out]``, ``b_dec`` ``[d_out]``; ``threshold`` ``[d_sae]`` (``jumprelu``); ``b_gate``, ``b_mag``, ``r_mag``
            ``[d_sae]`` in place of ``b_enc`` (``gated``); ``W_skip`` ``[d_out, d_in]``.
        cfg: what the dictionary computes, and where it belongs.
        sparsity: ``[d_sae]``, log10 of how often each feature fires; ``None`` if unknown.

    Raises:
        DictionaryError: parameters are missing, unknown, of a wrong shape, or not all of one dtype; lists them all.

    >>> cfg = DictionaryConfig(d_in=2, d_sae=3)
    >>> params = {"W_enc": jnp.ones((2, 3)), "b_enc": jnp.zeros(3), "W_dec": jnp.ones((3, 2)), "b_dec": jnp.zeros(2)}
    >>> x_hat, features = Dictionary(params, cfg)(jnp.ones((5, 2)))
    >>> x_hat.shape, features.shape
    ((5, 2), (5, 3))
    """

    params: dict[str, jax.Array]
    cfg: DictionaryConfig
    sparsity: jax.Array | None

    def __init__(self, params: Mapping[str, Any], cfg: DictionaryConfig, sparsity: Any = None) -> None:
        arrays = {name: jnp.asarray(value) for name, value in params.items()}
        check_parameters(arrays, cfg)
        rates = None if sparsity is None else jnp.asarray(sparsity)
        if rates is not None and rates.shape[-1:] != (cfg.d_sae,):
            raise DictionaryError(f"sparsity has shape {rates.shape}; it needs one entry a feature, [{cfg.d_sae}].")
        self.__dict__.update(params=arrays, cfg=cfg, sparsity=rates)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        key = jax.tree_util.GetAttrKey
        return [(key("params"), self.params), (key("sparsity"), self.sparsity)], self.cfg

    @classmethod
    def tree_unflatten(cls, aux: DictionaryConfig, children: Sequence[Any]) -> "Dictionary":
        dictionary = object.__new__(cls)
        dictionary.__dict__.update(params=children[0], cfg=aux, sparsity=children[1])
        return dictionary

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenModelError(
            f"A Dictionary cannot change in place (setting {name!r}): dictionary.replace({name}=...) returns a new one."
        )

    def __repr__(self) -> str:
        cfg, tap = self.cfg, self.cfg.tap
        where = "" if tap.reads is None else f" at {tap.reads}" + (f" -> {tap.writes}" if tap.writes else "")
        return f"Dictionary({cfg.architecture}, {cfg.d_in} -> {cfg.d_sae} -> {cfg.output_width}{where})"

    def replace(self, *, params: Any = None, cfg: DictionaryConfig | None = None, sparsity: Any = None) -> "Dictionary":
        """Returns a copy with other ``params``, ``cfg`` or ``sparsity``."""
        return Dictionary(
            self.params if params is None else params,
            self.cfg if cfg is None else cfg,
            self.sparsity if sparsity is None else sparsity,
        )

    # Parameters

    @property
    def W_enc(self) -> jax.Array:
        """Encoder, ``[d_in, d_sae]``; the decoder's transpose where weights are tied."""
        return self.params["W_enc"] if "W_enc" in self.params else jnp.swapaxes(self.W_dec, -1, -2)

    @property
    def W_dec(self) -> jax.Array:
        """Decoder, ``[d_sae, d_out]``: one direction for each feature."""
        return self.params["W_dec"]

    @property
    def b_enc(self) -> jax.Array | None:
        """Encoder bias, ``[d_sae]``, if there is one."""
        return self.params.get("b_enc")

    @property
    def b_dec(self) -> jax.Array:
        """Decoder bias, ``[d_out]``."""
        return self.params["b_dec"]

    @property
    def dtype(self) -> Any:
        """Dtype of the parameters, in which everything is computed."""
        return self.W_dec.dtype

    @property
    def decoder_norms(self) -> jax.Array:
        """Norm of each feature's decoder direction, ``[d_sae]``."""
        return jnp.linalg.norm(self.W_dec, axis=-1)

    # Encoding and decoding

    def encode(self, activations: jax.Array) -> jax.Array:
        """Computes the features of activations.

        Args:
            activations: ``[..., d_in]``, or ``[..., head, d_head]`` where heads are merged.

        Returns:
            Features ``[..., d_sae]`` in the dictionary's dtype.

        Raises:
            DictionaryError: the activations are of another width.
        """
        return self.encode_at(activations).features

    def encode_at(self, activations: jax.Array, at: At = _unhooked) -> Encoded:
        """Encodes, and passes SAELens's ``hook_sae_*`` values through ``at`` on the way.

        Args:
            activations: as in :meth:`encode`.
            at: called with ``hook_sae_input``, ``hook_sae_acts_pre`` (before a rescaling by decoder norms; of gated
                dictionaries the magnitudes) and ``hook_sae_acts_post``.
        """
        cfg, params = self.cfg, self.params
        x = at("hook_sae_input", self.merged(activations))
        x, factors = normalize(x, cfg)
        factors = UNCHANGED if cfg.transcoder else factors
        if cfg.architecture == "temporal":
            novel, predicted = encode_temporal(x - each(self.b_dec, x) if cfg.apply_b_dec_to_input else x, params, cfg)
            return Encoded(at("hook_sae_acts_post", novel), factors, predicted)
        x = x - each(self.b_dec, x) if cfg.apply_b_dec_to_input else x
        if cfg.architecture == "matching_pursuit":
            return Encoded(at("hook_sae_acts_post", pursue(x, self.W_dec, cfg)), factors, None)
        h = self._times(x, "W_enc")
        if cfg.architecture == "gated":
            magnitudes = at("hook_sae_acts_pre", h * each(jnp.exp(params["r_mag"]), h) + each(params["b_mag"], h))
            features = jnp.where(h + each(params["b_gate"], h) <= 0, 0, jax.nn.relu(magnitudes))
        else:
            h = at("hook_sae_acts_pre", h + each(params["b_enc"], h))
            h = h * each(self.decoder_norms, h) if cfg.rescale_acts_by_decoder_norm else h
            features = select(h, cfg, params.get("threshold"))
        return Encoded(at("hook_sae_acts_post", features), factors, None)

    def decode(self, features: jax.Array, activations: jax.Array | None = None) -> jax.Array:
        """Computes the reconstruction from features.

        Args:
            features: ``[..., d_sae]``.
            activations: what was encoded. Needed where a token's normalisation has to be undone (``layer_norm``,
                ``constant_norm_rescale``), and to split merged heads again; otherwise it changes nothing.

        Returns:
            ``[..., d_out]``, or shaped like ``activations`` where heads are merged. The ``W_skip`` of a transcoder is
            left out, as SAELens does; :meth:`__call__` and :meth:`forward` include it.

        Raises:
            DictionaryError: the features are of another width, or ``activations`` are needed.
        """
        cfg = self.cfg
        if features.shape[-1] != cfg.d_sae:
            raise DictionaryError(
                f"Features of shape {features.shape} do not fit: the last axis needs d_sae={cfg.d_sae}."
            )
        factors = UNCHANGED
        if activations is not None and not cfg.transcoder:
            _, factors = normalize(self.merged(activations), cfg)
        elif depends_on_input(cfg):
            raise DictionaryError(
                f'normalize_activations="{cfg.normalize_activations}" is undone token by token: pass the activations '
                "that were encoded, decode(features, activations)."
            )
        elif not cfg.transcoder and cfg.normalize_activations == "constant_scalar_rescale":
            factors = Factors(1 / cfg.scale)
        output = factors.undo(self.decode_normalized(features))
        return self.split(output, activations)

    def decode_normalized(self, features: jax.Array) -> jax.Array:
        """Computes ``features @ W_dec + b_dec`` ``[..., d_out]``, before a normalisation is undone."""
        cfg, output = self.cfg, self.decode_change(features)
        adds_bias = cfg.apply_b_dec_to_input or cfg.architecture != "matching_pursuit"
        if cfg.architecture == "temporal" and cfg.tied_weights and not cfg.apply_b_dec_to_input:
            adds_bias = False
        return output + each(self.b_dec, output) if adds_bias else output

    def decode_change(self, features: jax.Array) -> jax.Array:
        """Computes what a change of features ``[..., d_sae]`` changes in :meth:`decode_normalized`."""
        norms = self.cfg.rescale_acts_by_decoder_norm
        scaled = features / each(self.decoder_norms, features) if norms else features
        return self._times(scaled.astype(self.dtype), "W_dec")

    @property
    def is_laid_out(self) -> bool:
        """Whether :meth:`laid_out` made this dictionary: it decodes few rows on a CPU, and no gradient is taken."""
        return bool(self.__dict__.get("_layouts"))

    def laid_out(self, layouts: Mapping[str, jax.Array]) -> "Dictionary":
        """Returns the dictionary with other layouts of ``W_enc`` and ``W_dec``, for products with few rows on a CPU.

        Args:
            layouts: some of the two, each ``[piece, in, out]`` or transposed, ``[out, in]``. They do not go through
                ``jax`` transformations as part of the dictionary.
        """
        dictionary = self.tree_unflatten(self.cfg, (self.params, self.sparsity))
        dictionary.__dict__["_layouts"] = dict(layouts)
        return dictionary

    def _times(self, x: jax.Array, name: str) -> jax.Array:
        """Returns ``x @ W`` for ``W_enc`` or ``W_dec``, by another layout of it if there is one."""
        other = self.__dict__.get("_layouts", {}).get(name)
        if other is None:
            return product(x, self.W_enc if name == "W_enc" else self.W_dec)
        rows = x.reshape(-1, x.shape[-1])
        if other.ndim == 3:  # one row at a time: XLA repacks the weight for two
            pieces = rows.reshape(-1, *other.shape[:2])
            each_row = [jnp.einsum("si,sio->so", row, other, precision="highest").sum(axis=0) for row in pieces]
            output = jnp.stack(each_row)
        else:  # without the barrier XLA transposes the product back
            output = jax.lax.optimization_barrier(product(other, rows.T)).T
        return output.reshape(*x.shape[:-1], -1)

    def skip(self, activations: jax.Array) -> jax.Array | None:
        """Returns what a transcoder's skip connection adds, ``x @ W_skip.T`` ``[..., d_out]``; ``None`` without one."""
        if "W_skip" not in self.params:
            return None
        return product(self.merged(activations), self.params["W_skip"].T)

    def forward(self, activations: jax.Array) -> jax.Array:
        """Reconstructs activations: ``[..., d_out]``, shaped like the input where heads are merged."""
        return self(activations).reconstruction

    def __call__(self, activations: jax.Array) -> Reconstruction:
        """Encodes and decodes: ``x_hat, features = dictionary(x)``.

        Args:
            activations: as in :meth:`encode`.
        """
        encoded = self.encode_at(activations)
        features = encoded.features if encoded.predicted is None else encoded.features + encoded.predicted
        output = encoded.factors.undo(self.decode_normalized(features))
        skipped = self.skip(activations)
        output = output if skipped is None else output + skipped
        return Reconstruction(self.split(output, activations), encoded.features)

    def features(self, activations: jax.Array, k: int = 10) -> TopFeatures:
        """Returns the ``k`` strongest features of each token."""
        return TopFeatures(*jax.lax.top_k(self.encode(activations), min(k, self.cfg.d_sae)))

    # Heads

    def merged(self, activations: Any) -> jax.Array:
        """Returns activations ``[..., d_in]`` in the dictionary's dtype, with heads merged where it reads them so.

        Raises:
            DictionaryError: they are of another width.
        """
        x, d_in = jnp.asarray(activations), self.cfg.d_in
        if self.cfg.tap.merged_heads and x.ndim >= 2 and x.shape[-1] != d_in and x.shape[-1] * x.shape[-2] == d_in:
            x = x.reshape(*x.shape[:-2], d_in)
        if x.ndim < 1 or x.shape[-1] != d_in:
            raise DictionaryError(
                f"Activations of shape {x.shape} do not fit {self!r}: the last axis needs d_in={d_in}."
            )
        return x.astype(self.dtype)

    def split(self, output: jax.Array, activations: Any) -> jax.Array:
        """Returns an output ``[..., d_out]`` in the shape of the activations where heads were merged."""
        if activations is None or output.ndim == jnp.ndim(activations):
            return output
        return output.reshape(*output.shape[:-1], *jnp.shape(activations)[-2:])


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Returns ``x @ matrix``, in float32 as float32 whatever JAX's default is."""
    return jnp.matmul(x, matrix, precision="highest")


def parameter_shapes(cfg: DictionaryConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each parameter that a config needs (optional ones are not among them)."""
    d, f, out = cfg.d_in, cfg.d_sae, cfg.output_width
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (f, out), "b_dec": (out,)}
    match cfg.architecture:
        case "matching_pursuit":
            return shapes
        case "gated":
            return {"W_enc": (d, f), **shapes, "b_gate": (f,), "b_mag": (f,), "r_mag": (f,)}
        case "temporal":
            narrow = f // cfg.bottleneck_factor
            own = {} if cfg.tied_weights else {"W_enc": (d, f)}
            for layer in range(cfg.n_attn_layers):
                own |= {f"attn_layers.{layer}.{part}.weight": (narrow, f) for part in ("k_ctx", "q_target")}
                own |= {f"attn_layers.{layer}.{part}.weight": (f, f) for part in ("v_ctx", "c_proj")}
            return {**own, **shapes}
        case "jumprelu":
            return {"W_enc": (d, f), "b_enc": (f,), **shapes, "threshold": (f,)}
        case _:
            return {"W_enc": (d, f), "b_enc": (f,), **shapes}


def _optional_shapes(cfg: DictionaryConfig) -> dict[str, tuple[int, ...]]:
    if cfg.architecture == "temporal":
        weights = {name: shape for name, shape in parameter_shapes(cfg).items() if name.endswith(".weight")}
        return {name.removesuffix("weight") + "bias": shape[:1] for name, shape in weights.items()}
    return {"W_skip": (cfg.output_width, cfg.d_in)} if cfg.transcoder else {}


def check_parameters(params: Mapping[str, jax.Array], cfg: DictionaryConfig) -> None:
    """Checks parameters against a config; all of them may have the same leading axes, as a stack of dictionaries does.

    Raises:
        DictionaryError: lists every parameter that is missing, unknown, of a wrong shape, or of another dtype.
    """
    needed, optional = parameter_shapes(cfg), _optional_shapes(cfg)
    problems = [f"{name} {list(shape)} is missing" for name, shape in needed.items() if name not in params]
    known = needed | optional
    problems += [f"{name} is unknown to architecture {cfg.architecture!r}" for name in params if name not in known]
    stacked = params["W_dec"].shape[:-2] if "W_dec" in params else ()
    for name, array in params.items():
        if name in known and array.shape != (*stacked, *known[name]):
            problems.append(f"{name} has shape {list(array.shape)}, expected {[*stacked, *known[name]]}")
    dtypes = {str(array.dtype) for array in params.values()}
    if len(dtypes) > 1:
        problems.append(f"parameters have dtypes {', '.join(sorted(dtypes))}, expected one")
    elif dtypes and not all(jnp.issubdtype(array.dtype, jnp.floating) for array in params.values()):
        problems.append(f"parameters are {dtypes.pop()}, expected floating numbers")
    if problems:
        raise DictionaryError(
            f"The parameters do not fit d_in={cfg.d_in}, d_sae={cfg.d_sae}, d_out={cfg.output_width}: "
            + "; ".join(problems)
            + "."
        )
