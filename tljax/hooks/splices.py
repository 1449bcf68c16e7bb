"""Dictionaries inside a forward pass: where they sit, the hook points that they open, and what they put out.

A dictionary replaces the value of the point that it writes. The point itself stays: it fires first, with the value that
the model computed. Then the dictionary's own points fire, by SAELens's names, and the model goes on with the last of
them, ``hook_sae_output``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tljax.errors import InputError
from tljax.hooks.point import HOOKS, hook
from tljax.numerics import widest
from tljax.splice import ACTS_POST, ACTS_PRE, ERROR, INPUT, OUTPUT, RECONS, Splice


def value_after(name: str, splices: Iterable[Splice]) -> str:
    """Returns the point that holds what the model goes on with after a point: itself, unless a dictionary writes it."""
    return f"{name}.{OUTPUT}" if any(splice.writes == name for splice in splices) else name


def refuse_splices(splices: Sequence[Splice], what: str, instead: str) -> None:
    """Refuses spliced models where a function takes the model apart as if nothing were spliced in.

    Args:
        splices: the model's.
        what: the function and what it takes the model for, a clause.
        instead: what to do, a sentence.

    Raises:
        InputError: a dictionary is spliced in.
    """
    if splices:
        raise InputError(f"{what}, and a dictionary is spliced in at {splices[0].writes}. {instead}")


def with_spliced_points(rows: Sequence[Any], splices: Sequence[Splice]) -> tuple[Any, ...]:
    """Returns rows of the hook table with those of spliced dictionaries, each after the point that it writes."""
    if not splices:
        return tuple(rows)
    named, written = {row.name: row for row in rows}, {splice.writes: splice for splice in splices}
    found: list[Any] = []
    for row in rows:
        if row.name not in written:
            found.append(row)
            continue
        splice = written[row.name]
        found.append(dataclasses.replace(row, adds_to=None))
        found += _rows_of(splice, named[splice.reads], row)
    return tuple(found)


def _rows_of(splice: Splice, read: Any, written: Any) -> Iterator[Any]:
    own = np.dtype(splice.dtype)
    plain = {"optional": False, "below": None, "aliases": (), "read_by": "", "asks_for": "shared", "adds_to": None}
    base = dataclasses.replace(written, **plain)
    features = {"axes": ("batch", "pos", "feature"), "dtype": own, "sizes": (("feature", splice.d_sae),)}

    def one_head(row: Any) -> tuple[str, ...]:
        return row.axes if splice.head is None else tuple(axis for axis in row.axes if axis != "head")

    def vector(row: Any, width: int) -> dict[str, Any]:
        axes = ("batch", "pos", "all_heads") if splice.merged_heads else one_head(row)
        return {"axes": axes, "dtype": own, "sizes": (*row.sizes, ("all_heads", width))}

    columns = {
        INPUT: (vector(read, splice.d_in), "what the dictionary encodes"),
        ACTS_PRE: (features, "features before their activation function"),
        ACTS_POST: (features, "features"),
        RECONS: (vector(written, splice.d_out), "reconstruction, before a normalisation of the input is undone"),
        ERROR: (
            {"axes": one_head(written), "dtype": np.dtype(widest(written.dtype, own))},
            "what the unchanged reconstruction lacks",
        ),
        OUTPUT: ({"adds_to": written.adds_to}, "what the model goes on with"),
    }
    for name in splice.points:
        changes, meaning = columns[name]
        yield dataclasses.replace(base, name=f"{written.name}.{name}", meaning=meaning, **changes)


At = Callable[[str, jax.Array], jax.Array]
"""Function of a point's name and its value that returns the value to go on with."""


class Spliced(Protocol):
    """What a splice asks of a dictionary; :class:`tljax.dictionaries.Dictionary` is one."""

    def encode_at(self, activations: jax.Array, at: At = ...) -> Any: ...

    @property
    def is_laid_out(self) -> bool: ...

    def decode_normalized(self, features: jax.Array) -> jax.Array: ...

    def decode_change(self, features: jax.Array) -> jax.Array: ...

    def skip(self, activations: jax.Array) -> jax.Array | None: ...


class Splicing:
    """The dictionaries of one stage during one call of its module; :func:`~tljax.hooks.point.hook` asks it.

    Args:
        splices: where they sit, named relative to the stage.
        dictionaries: the dictionaries by the point that they write.
        tokens: ids ``[batch, pos]`` of the tokens of the run; needed only by ``exclude_tokens``.
        computed: function that takes those tokens of ``[batch, pos, ...]`` whose output the run computes.
    """

    def __init__(
        self,
        splices: Sequence[Splice],
        dictionaries: Mapping[str, Spliced],
        tokens: jax.Array | np.ndarray | None,
        computed: Callable[[Any], Any],
    ) -> None:
        self._by_written = {splice.writes: splice for splice in splices}
        self._read_elsewhere = {splice.reads for splice in splices if splice.reads != splice.writes}
        self._dictionaries, self._tokens, self._computed = dictionaries, tokens, computed
        self._values: dict[str, jax.Array] = {}

    def after(self, module: nn.Module, name: str, value: jax.Array) -> jax.Array:
        """Returns what the model goes on with after a point: the output of the dictionary there, if there is one."""
        full = ".".join((*module.path, name))
        if (splice := self._by_written.get(full)) is not None:
            value = self._output(module, name, splice, value)
        if full in self._read_elsewhere:
            self._values[full] = value
        return value

    def _output(self, module: nn.Module, name: str, splice: Splice, value: jax.Array) -> jax.Array:
        read = value if splice.reads == splice.writes else self._values[splice.reads]
        if splice.reads_every and not splice.writes_every:
            read = self._computed(read)
        own = value
        if splice.head is not None:
            read, own = read[:, :, splice.head], value[:, :, splice.head]
        output = self._reconstructed(module, name, splice, read, own)
        output = output.astype(value.dtype)
        if splice.head is not None:
            output = value.at[:, :, splice.head].set(output)
        return hook(module, f"{name}.{OUTPUT}", output)

    def _reconstructed(
        self, module: nn.Module, name: str, splice: Splice, read: jax.Array, own: jax.Array
    ) -> jax.Array:
        """Returns the reconstruction of ``own`` from ``read``, with the error term if that is kept."""
        dictionary, excluded = self._dictionaries[splice.writes], self._excluded(splice, own)

        def at(inner: str, value: jax.Array) -> jax.Array:
            return hook(module, f"{name}.{inner}", value)

        encoded = [dictionary.encode_at(read, at)]
        before_error = splice.points[: splice.points.index(RECONS) + 1]
        if splice.error == "keep" and any(_changes(module, f"{name}.{inner}") for inner in before_error):
            encoded.append(dictionary.encode_at(read))
        if len(encoded) == 2 and dictionary.is_laid_out and self._only_features_change(module, name):
            output = _moved(dictionary, own, *encoded)
        else:
            output, *others = _outputs(dictionary, read, encoded, splice.skip, at, own.shape)
            if splice.error == "keep":
                clean = others[0] if others else output
                wide = widest(own.dtype, clean.dtype)
                error = own.astype(wide) - clean.astype(wide)
                error = jax.lax.stop_gradient(error) if splice.gradient == "stop" else error
                error = error if excluded is None else jnp.where(excluded, jnp.zeros_like(error), error)
                output = output.astype(wide) + at(ERROR, error)
        return output if excluded is None else jnp.where(excluded, own.astype(output.dtype), output)

    @staticmethod
    def _only_features_change(module: nn.Module, name: str) -> bool:
        """Whether the run changes the dictionary's features, and nobody sees its reconstruction or error."""
        unseen = all(module.get_variable(HOOKS, f"{name}.{inner}") is None for inner in (RECONS, ERROR))
        return unseen and not _changes(module, f"{name}.{INPUT}")

    def _excluded(self, splice: Splice, own: jax.Array) -> jax.Array | None:
        """Returns a mask ``[batch, pos, ...]`` of the positions that keep the model's value; ``None`` if none do."""
        if not splice.exclude_tokens:
            return None
        assert self._tokens is not None, "a run whose dictionaries exclude tokens knows its tokens"
        tokens = self._tokens if splice.writes_every else self._computed(self._tokens)
        excluded = jnp.isin(tokens, np.asarray(splice.exclude_tokens, np.int32))
        return excluded.reshape(*excluded.shape, *(1,) * (own.ndim - 2))


def _outputs(
    dictionary: Spliced,
    read: jax.Array,
    encoded: Sequence[Any],
    skip: bool,
    at: At,
    shape: tuple[int, ...],
) -> list[jax.Array]:
    """Returns the outputs for several encodings of what is read; the reconstruction of the first goes through ``at``.

    They are decoded together, so that the decoder is read from memory once.
    """
    if len(encoded) == 1:
        recons = [dictionary.decode_normalized(encoded[0].features)]
    else:
        recons = list(dictionary.decode_normalized(jnp.stack([one.features for one in encoded])))
    recons[0] = at(RECONS, recons[0])
    outputs = [one.factors.undo(recon) for one, recon in zip(encoded, recons, strict=True)]
    skipped = dictionary.skip(read) if skip else None
    return [(one if skipped is None else one + skipped).reshape(shape) for one in outputs]


def _moved(dictionary: Spliced, own: jax.Array, changed: Any, clean: Any) -> jax.Array:
    """Returns the output for changed features with the error of the clean ones, by one product where it takes two."""
    change = dictionary.decode_change(changed.features - clean.features) * clean.factors.scale
    wide = widest(own.dtype, change.dtype)
    return own.astype(wide) + change.reshape(own.shape).astype(wide)


def _changes(module: nn.Module, name: str) -> bool:
    """Whether the run's hooks at a point may change its value or its gradient."""
    slot: Any = module.get_variable(HOOKS, name)
    return slot is not None and bool(slot.forward or slot.backward)
