"""Where a dictionary reads and writes in a model, and what it makes of a run's activations."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tljax.dictionaries.cross_layer import CrossLayerTranscoder
from tljax.dictionaries.crosscoder import Crosscoder
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.maths.config import Tap
from tljax.errors import DictionaryError
from tljax.hooks.names import resolve
from tljax.hooks.points import HookPointSpec, point_table
from tljax.model.hooked_transformer import HookedTransformer

AnyDictionary = Dictionary | Crosscoder | CrossLayerTranscoder
"""What can be evaluated."""


@dataclasses.dataclass(frozen=True)
class Sites:
    """The points that a dictionary reads and those that it reconstructs. Hashable: a static part of programs.

    Attributes:
        reads, writes: full names, one for each source of a crosscoder or layer of a cross-layer transcoder.
        heads: the head that is read and written at each; ``None`` means the whole point.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    heads: tuple[int | None, ...]

    @classmethod
    def of(cls, dictionary: AnyDictionary, model: HookedTransformer) -> "Sites":
        """Reads them from the dictionary's taps, and checks them against a model.

        Raises:
            DictionaryError: a tap is unknown, the widths differ, or a parameter is not finite.
            UnknownHookError: the model has no such point.
        """
        if not isinstance(dictionary, Dictionary | Crosscoder | CrossLayerTranscoder):
            raise DictionaryError(
                f"dictionary is a {type(dictionary).__name__}; give a Dictionary, a Crosscoder or a "
                "CrossLayerTranscoder, such as Dictionary.from_pretrained returns."
            )
        taps = (dictionary.cfg.tap,) if isinstance(dictionary, Dictionary) else dictionary.cfg.taps
        if not taps or any(tap.reads is None for tap in taps):
            raise DictionaryError(
                f"{dictionary!r} does not say which hook point it belongs to. Say it: "
                'cfg = cfg.replace(tap=Tap(reads="blocks.8.hook_resid_pre")), and '
                "dictionary.replace(cfg=cfg)."
            )
        table = point_table(model.cfg)
        reads = tuple(resolve(tap.reads, table, model.cfg.n_layers) for tap in taps)
        writes = tuple(resolve(tap.writes or tap.reads, table, model.cfg.n_layers) for tap in taps)
        sites = cls(reads, writes, tuple(tap.head for tap in taps))
        widths = {"reads": dictionary.cfg.d_in, "writes": _width_written(dictionary)}
        for verb, names in (("reads", reads), ("writes", writes)):
            for name, tap in zip(names, taps, strict=True):
                _check_width(table[name], tap, widths[verb], verb, dictionary)
        unfit = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(dictionary)
            if not bool(jnp.isfinite(leaf).all())
        ]
        if unfit:
            raise DictionaryError(f"{dictionary!r} holds numbers that are not finite, in {', '.join(unfit)}.")
        return sites

    @property
    def names(self) -> list[str]:
        """All points, each once."""
        return list(dict.fromkeys([*self.reads, *self.writes]))

    def part(self, value: jax.Array, site: int) -> jax.Array:
        """Returns the part of a point's value that the dictionary deals with."""
        head = self.heads[site]
        return value if head is None else value[..., head, :]

    def put(self, value: jax.Array, part: jax.Array, site: int) -> jax.Array:
        """Returns a point's value with ``part`` in place of what :meth:`part` returns."""
        head = self.heads[site]
        part = part.astype(value.dtype)
        return part if head is None else value.at[..., head, :].set(part)


@dataclasses.dataclass(frozen=True)
class Reconstructed:
    """A dictionary applied to the activations of a run.

    Attributes:
        targets, outputs: what is reconstructed and the reconstruction, float32, ``[batch, pos, width]``, all sites side
            by side.
        features: ``[batch, pos, d_sae]``; of a cross-layer transcoder all layers' side by side.
        parts: the reconstruction of each site, shaped like :meth:`Sites.part`.
    """

    targets: jax.Array
    outputs: jax.Array
    features: jax.Array
    parts: tuple[jax.Array, ...]


def apply_dictionary(dictionary: AnyDictionary, sites: Sites, values: Mapping[str, jax.Array]) -> Reconstructed:
    """Applies a dictionary to a run's activations by name."""
    inputs = [sites.part(values[name], site) for site, name in enumerate(sites.reads)]
    targets = [sites.part(values[name], site) for site, name in enumerate(sites.writes)]
    match dictionary:
        case Dictionary():
            output, features = dictionary(inputs[0])
            outputs = [output]
        case Crosscoder():
            output, features = dictionary(jnp.stack(inputs, axis=-2))
            outputs = [output[..., source, :] for source in range(len(inputs))]
        case CrossLayerTranscoder():
            output, by_layer = dictionary(jnp.stack(inputs))
            outputs = list(output)
            features = jnp.concatenate(list(by_layer), axis=-1)
    outputs = [one.reshape(target.shape) for one, target in zip(outputs, targets, strict=True)]
    return Reconstructed(_side_by_side(targets), _side_by_side(outputs), features, tuple(outputs))


def _side_by_side(values: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([one.reshape(*one.shape[:2], -1).astype(jnp.float32) for one in values], axis=-1)


def _width_written(dictionary: AnyDictionary) -> int:
    return dictionary.cfg.output_width if isinstance(dictionary, Dictionary) else dictionary.cfg.d_in


def _check_width(spec: HookPointSpec, tap: Tap, width: int, verb: str, dictionary: AnyDictionary) -> None:
    shape = spec.shape()[2:]
    read = shape if tap.head is None and tap.merged_heads else shape[-1:]
    if math.prod(read) != width or (len(shape) > 1 and len(read) == 1 and tap.head is None):
        heads = " Heads are read as one vector with Tap(merged_heads=True), one of them with Tap(head=...)."
        raise DictionaryError(
            f"{dictionary!r} {verb} {width} numbers at {spec.name}, where this model has {list(shape)} a token."
            + (heads if len(shape) > 1 else "")
        )
