"""Fingerprints, which say to which model an activation, a lens or a file belongs.

A fingerprint holds the config, with the weight processing, and a sample: a few numbers of every parameter, read once
for each set of parameters (2 ms at the shape of gpt2-small). Samples are compared up to rounding, so a model equals
itself in bfloat16, on another device, or processed elsewhere, but not after one step of fine-tuning. A change to a few
entries only (one token's row, one neuron) may go unseen. For traced parameters only the configs are compared; of blocks
that stay in a checkpoint's files (``offload="host"``) only the first is read.
"""

import base64
import dataclasses
import functools
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tljax.config import BOOKKEEPING, HookedTransformerConfig
from tljax.dictionary_params import dictionaries_in, without_dictionaries
from tljax.offload import HostBlocks
from tljax.processes import fetch, is_distributed
from tljax.quantized_weight import QuantizedWeight, is_quantized_weight
from tljax.typing import Params

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer

NOT_THE_FUNCTION = frozenset({*BOOKKEEPING, "dtype", "matmul_precision", "attention_path", "attention_block"})
"""Config fields that do not change what the model computes, except for rounding."""

FORM = {"config": dict, "weights": (None, {"values": str, "rounding": float})}
"""Schema of a fingerprint in a file's header, for :func:`tljax.schema.mismatch`."""

_NOT_THE_STREAM = ("d_vocab", "d_vocab_out", "logits_multiplier", "output_logits_soft_cap", "splices")
_COUNT = 16
"""Numbers sampled from each parameter."""
_UNREAD = b"\x01\x00\xc0\x7f" * _COUNT
"""The sample of a parameter that was not read: a NaN that no computation makes."""
_NOISE = 1e-5
"""Difference, as a share of a parameter's size, that processing on two machines may cause."""
_KIN = 0.4
"""Mean correlation of parameters from which one model may be fine-tuned from the other; unrelated models have 0."""
_MOST_LAYERS = 100_000
_MOST_KEPT = 8


@dataclasses.dataclass(frozen=True)
class WeightSample:
    """Sample of a model's weights: a few numbers of every parameter.

    Attributes:
        values: float32 in little-endian bytes, ``[parameter, 16]``.
        rounding: the coarsest relative rounding among the parameters' dtypes.
    """

    values: bytes
    rounding: float

    @property
    def array(self) -> np.ndarray:
        """The numbers, float64 ``[parameter, 16]``."""
        return np.frombuffer(self.values, "<f4").reshape(-1, _COUNT).astype(np.float64)

    @property
    def _read(self) -> np.ndarray:
        """Which parameters were read, ``[parameter]``."""
        width = len(_UNREAD)
        rows = (self.values[start : start + width] for start in range(0, len(self.values), width))
        return np.array([row != _UNREAD for row in rows], bool)

    def is_of_the_same(self, other: "WeightSample") -> bool:
        """Whether both samples are of the same weights, up to rounding."""
        if self == other:
            return True
        if len(self.values) != len(other.values):
            return False
        seen = self._read & other._read
        one, two = self.array[seen], other.array[seen]
        with np.errstate(invalid="ignore", over="ignore"):
            sizes = np.sqrt(np.maximum((one**2).mean(axis=1), (two**2).mean(axis=1)))
            sizes = np.maximum(sizes, 0.01 * np.sqrt((sizes**2).mean()))[:, None]
            rounding = max(self.rounding, other.rounding) * np.maximum(np.abs(one), np.abs(two))
            near = np.abs(one - two) <= rounding + _NOISE * sizes
        return bool((near | (one == two) | (np.isnan(one) & np.isnan(two))).all())

    def is_kin_of(self, other: "WeightSample") -> bool:
        """Whether one model may be fine-tuned from the other: their parameters correlate on average."""
        shared = min(len(self.array), len(other.array))  # one may be spliced: samples of dictionaries come last
        one, two = (array[:shared] - array[:shared].mean(axis=1, keepdims=True) for array in (self.array, other.array))
        norms = np.sqrt((one**2).sum(axis=1) * (two**2).sum(axis=1))
        informative = norms > 0
        if not informative.any():
            return True
        return bool(((one * two).sum(axis=1)[informative] / norms[informative]).mean() >= _KIN)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of a model.

    Attributes:
        cfg: the config; only fields that change what is computed, and the weight processing, are compared.
        weights: a sample of the parameters; ``None`` if their values are not known.
    """

    cfg: HookedTransformerConfig
    weights: WeightSample | None = None

    def differences(self, other: "Fingerprint") -> tuple[str, ...]:
        """Returns one phrase for each way in which another model differs; empty if no difference is known."""
        found = () if self.cfg is other.cfg else _differences(self.cfg, other.cfg, False)
        if found or self.weights is None or other.weights is None or self.weights.is_of_the_same(other.weights):
            return found
        return ("the weights are other numbers",)

    def differences_of_stream(self, other: "Fingerprint") -> tuple[str, ...]:
        """Returns the differences that matter to the residual stream: neither folded norms nor fine-tuning count."""
        found = _differences(self.cfg, other.cfg, True)
        if found or self.weights is None or other.weights is None or self.weights.is_kin_of(other.weights):
            return found
        return ("the weights have nothing in common",)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fingerprint as JSON values that match :data:`FORM`."""
        sample = self.weights
        values = None if sample is None else base64.b64encode(sample.values).decode()
        return {
            "config": self.cfg.to_dict(),
            "weights": None if sample is None else {"values": values, "rounding": sample.rounding},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Fingerprint":
        """Reads what :meth:`to_dict` returned.

        Raises:
            ValueError: this is not a fingerprint.
        """
        sample = stored["weights"]
        if sample is not None:
            values = base64.b64decode(sample["values"], validate=True)
            if len(values) % (4 * _COUNT):
                raise ValueError("its sample of the weights is incomplete")
            sample = WeightSample(values, float(sample["rounding"]))
        return cls(stored_config(stored["config"]), sample)


def stored_config(fields: Mapping[str, Any]) -> HookedTransformerConfig:
    """Returns a config that was read from one of tljax's own files.

    Raises:
        ValueError: the fields do not describe a model.
    """
    for name, value in fields.items():
        if name == "splices":  # the only objects; the config checks them
            continue
        for one in value if isinstance(value, list) else (value,):
            if not (one is None or isinstance(one, bool | int | float | str)):
                raise ValueError(f"{name} cannot be a {type(one).__name__}")
    if isinstance(layers := fields.get("n_layers"), int) and layers > _MOST_LAYERS:
        raise ValueError(f"n_layers={layers} is more than any model has")
    try:
        cfg = HookedTransformerConfig.from_dict(fields)
        hash(cfg.replace())  # what a model will do with it
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"its fields do not describe a model: {error}") from error
    return cfg


def fingerprint_of(model: "HookedTransformer", *, together: bool = False) -> Fingerprint:
    """Returns the fingerprint of a model; hooks do not change it.

    Args:
        model: the model.
        together: whether all processes that a model is spread over make this call; otherwise its weights are unknown.
    """
    return Fingerprint(model.cfg, sample_of(model.params, together=together))


@functools.lru_cache(maxsize=256)
def _differences(there: HookedTransformerConfig, here: HookedTransformerConfig, stream: bool) -> tuple[str, ...]:
    ignored = {*NOT_THE_FUNCTION, "n_ctx", *(_NOT_THE_STREAM if stream else ())}

    def value(cfg: HookedTransformerConfig, name: str) -> Any:
        got = getattr(cfg, name)
        if name == "splices":
            return tuple(splice.computation for splice in got)
        return got.removesuffix("Pre") if name == "normalization_type" and got is not None else got

    names = [field.name for field in dataclasses.fields(there) if field.name not in ignored]
    found = [
        f"{name}={getattr(there, name)!r} there, {getattr(here, name)!r} here"
        for name in names
        if value(there, name) != value(here, name)
    ]
    counted = ("center_writing_weights",) if stream else there.weight_processing + here.weight_processing
    found += [
        f"{step} {'applied there, not here' if step in there.weight_processing else 'applied here, not there'}"
        for step in dict.fromkeys(counted)
        if (step in there.weight_processing) != (step in here.weight_processing)
    ]
    if not stream and not found and there.normalization_type != here.normalization_type:
        found = [f"normalization_type={there.normalization_type!r} there, {here.normalization_type!r} here"]
    return tuple(found)


_kept: dict[tuple[int, ...], tuple[list["weakref.ref[Any]"], WeightSample]] = {}
"""Cache of samples for the latest few sets of arrays, by identity; safe because JAX arrays never change."""


def sample_of(params: Params, *, together: bool = False) -> WeightSample | None:
    """Returns a sample of parameters; ``None`` if they are traced, deleted or (unless ``together``) on other hosts.

    Samples of the latest few sets of parameters are cached for as long as the arrays live.
    """
    own = without_dictionaries(params)
    own = {name: part for name, part in own.items() if name != "pos_embed"}  # its length is n_ctx
    dictionaries, on_host = dictionaries_in(params), None
    if isinstance(own.get("blocks"), HostBlocks):
        on_host = _sample_on_host(own.pop("blocks"))
    leaves = jax.tree.leaves(own, is_leaf=is_quantized_weight) + jax.tree.leaves(dictionaries)
    sample = _sample_of_arrays(leaves, together)
    if sample is None or on_host is None:
        return sample
    return WeightSample(on_host.values + sample.values, max(on_host.rounding, sample.rounding))


def _sample_on_host(blocks: HostBlocks) -> WeightSample:
    """Returns the sample of blocks that stay on the host; those in files are not read for it, but for the first."""
    if "sample" not in blocks.known:
        values, rounding = [], 0.0
        for layer, shapes in enumerate(blocks.shapes):
            block = blocks.read(layer) if layer < blocks.n_sampled else shapes
            leaves = jax.tree.leaves(block, is_leaf=is_quantized_weight)
            rounding = max(rounding, *(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves))
            values += [_bytes(_some(leaf)) if layer < blocks.n_sampled else _UNREAD for leaf in leaves]
        blocks.known["sample"] = WeightSample(b"".join(values), rounding)
    return blocks.known["sample"]


def _bytes(values: Any) -> bytes:
    with np.errstate(over="ignore"):
        return np.asarray(values).astype("<f4").tobytes()


def _sample_of_arrays(leaves: list[Any], together: bool) -> WeightSample | None:
    """Returns the sample of arrays, in their order; ``None`` if one of them cannot be read."""
    key = tuple(map(id, leaves))
    references, sample = _kept.get(key, ([], None))
    distributed = any(map(is_distributed, jax.tree.leaves(leaves)))
    if distributed:  # other processes may not have it cached
        sample = None
    if sample is not None and all(ref() is leaf for ref, leaf in zip(references, leaves, strict=True)):
        return sample
    if not leaves or not all(map(_is_known, leaves)) or (distributed and not together):
        return None
    values = fetch([_some(leaf) for leaf in leaves])
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
    sample = WeightSample(b"".join(map(_bytes, values)), rounding)
    if not any(isinstance(leaf, np.ndarray) for leaf in leaves):  # numpy's can change in place
        while len(_kept) >= _MOST_KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[key] = ([weakref.ref(leaf) for leaf in leaves], sample)
    return sample


def _is_known(leaf: Any) -> bool:
    if isinstance(leaf, QuantizedWeight):
        return all(isinstance(part, jax.Array) and _is_there(part) for part in leaf.parts.values())
    if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array | np.ndarray):
        return False
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    return isinstance(leaf, np.ndarray) or _is_there(leaf)


def _is_there(array: jax.Array) -> bool:
    return not isinstance(array, Tracer) and not array.is_deleted()


def _some(leaf: Any) -> Any:
    """Returns entries of a parameter at scattered indices, ``[16]``, without reading the others."""
    if not leaf.size:
        return np.zeros(_COUNT, np.float32)
    if not leaf.shape:  # a learned number
        return np.full(_COUNT, np.asarray(leaf))
    index = _places(leaf.shape)
    if isinstance(leaf, QuantizedWeight):
        return leaf.entries(index)
    if isinstance(leaf, np.ndarray) or _is_here(leaf):
        return np.asarray(leaf)[index]  # no copy is made
    return _gathered(leaf, index)


def _is_here(leaf: jax.Array) -> bool:
    devices = leaf.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


@functools.lru_cache(maxsize=1024)
def _places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    size = int(np.prod(shape, dtype=np.int64))
    flat = [((number + 1) * 0x9E3779B97F4A7C15 % 2**64) * size >> 64 for number in range(_COUNT)]  # golden ratio
    return tuple(np.asarray(place) for place in np.unravel_index(flat, shape))


@jax.jit
def _gathered(leaf: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
    return leaf[index]
