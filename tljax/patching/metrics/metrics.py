"""Metrics of a run's logits: small pytrees that read only the positions and the tokens they need.

Each is called with logits ``[batch, pos, d_vocab]`` and returns one number a prompt ``[batch]``, in float32 or wider.
Token ids and reference values are leaves, so other tokens never recompile a sweep.

Which sign is good: *denoising* patches clean activations into the corrupted run, so for ``LogitDiff``, ``Logit`` and
``LogProb`` of the clean answer a positive effect restores the behaviour; *noising* patches corrupted activations into
the clean run, and a negative effect destroys it. ``Loss``, and ``KL`` from the clean run, go the other way: they fall
where denoising restores and rise where noising destroys.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from tljax.checks import fits_int32
from tljax.errors import InputError
from tljax.model.losses import check_labels, next_tokens
from tljax.numerics import widened
from tljax.patching.metrics.lazy_logits import LazyLogits
from tljax.patching.metrics.reads import check_indices
from tljax.text import positions
from tljax.text.batch import Batch
from tljax.text.positions import read_mask

Logits = jax.Array | np.ndarray | LazyLogits
"""``[batch, pos, d_vocab]``."""


@runtime_checkable
class InText(Protocol):
    """A metric that can count its positions in padded prompts."""

    def in_text(self, attention_mask: Any) -> Any:
        """The same metric, for logits of prompts with this padding."""
        ...


class _Metric:
    """A frozen dataclass whose fields are leaves, all but a position given as a number, which is structure."""

    _is_placed: bool = False
    """Whether its positions are places in the array that were counted in a text, or logits were read at such."""

    def in_text(self, attention_mask: Any) -> Any:
        """The same metric with positions counted in the text of padded prompts: -1 is the last token of each.

        A sweep does so by itself, where it knows the padding.

        Args:
            attention_mask: ``[batch, pos]``, 0 at padding; or the :class:`~tljax.Batch` that was run.

        Raises:
            InputError: a position that a prompt does not have.
        """
        pos = getattr(self, "pos", None)
        if pos is None or self._is_placed:
            return self
        placed = dataclasses.replace(self, pos=_places(pos, attention_mask, type(self).__name__))  # type: ignore[type-var]
        placed._set("_is_placed", True)
        return placed

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        values = self._values()
        static = {name: value for name, value in values.items() if name == "pos" and isinstance(value, int | None)}
        leaves = {name: value for name, value in values.items() if name not in static}
        keyed = [(jax.tree_util.GetAttrKey(name), value) for name, value in leaves.items()]
        return keyed, (tuple(leaves), tuple(static.items()), self._is_placed)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Sequence[Any]) -> Any:
        names, static, is_placed = aux
        metric = object.__new__(cls)
        metric._set("_is_placed", is_placed)
        for name, value in (*zip(names, children, strict=True), *static):
            metric._set(name, value)
        return metric

    def _checked_ids(self, name: str) -> None:
        self._set(name, _token_ids(getattr(self, name), f"{type(self).__name__}({name}=...)"))

    def _checked_pos(self, pos: Any) -> None:
        self._set("pos", _position(pos, type(self).__name__))


def _token_ids(value: Any, owner: str) -> Any:
    """Token ids as int32, on the host."""
    if isinstance(value, Tracer) and jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.int32)
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        example = str(array.flat[0]) if array.dtype.kind == "U" and array.size else " word"
        raise InputError(
            f"{owner} got {value!r}; it takes token ids: an integer, or one for each prompt. "
            f"model.to_single_token({example!r}) gives the id of a word."
        )
    if not fits_int32(array):
        raise InputError(f"{owner} got {value!r}: no token has such an id, they are below {2**31}.")
    return array.astype(np.int32)


def _position(pos: Any, owner: str) -> Any:
    if isinstance(pos, Tracer) and pos.ndim == 1 and jnp.issubdtype(pos.dtype, jnp.integer):
        return pos.astype(jnp.int32)
    array = np.asarray(pos)
    if array.dtype.kind not in "iu" or array.ndim > 1:
        raise InputError(f"{owner}(pos=...) got {pos!r}; it takes a position, or one for each prompt [batch].")
    if not fits_int32(array):
        raise InputError(f"{owner}(pos=...) got {pos!r}: no prompt has such a position.")
    return array.astype(np.int32) if array.ndim else int(array)


def _places(pos: Any, attention_mask: Any, owner: str) -> Any:
    """Where positions of the text stand in the array, one for each prompt ``[batch]``."""
    mask = read_mask(_mask_in(attention_mask))
    if mask.ndim != 2 or (not isinstance(pos, int) and len(pos) != len(mask)):
        raise InputError(
            f"{owner} got a mask of shape {tuple(mask.shape)}, with pos={pos}: it is [batch, pos], as the prompts are, "
            "with one position for all, or one for each."
        )
    numbers = np.full((len(mask), 1), pos) if isinstance(pos, int) else pos[:, None]
    places, there = positions.find(mask, numbers)
    if not isinstance(there, Tracer) and not np.asarray(there).all():
        row = int(np.flatnonzero(~np.asarray(there))[0])
        wrong = row, int(np.asarray(numbers)[row, 0]), int(mask[row].sum())
        raise InputError(f"{owner}(pos=...): {positions.no_such_position(*wrong)}")
    return places[:, 0]


def _mask_in(attention_mask: Any) -> Any:
    return attention_mask.mask if isinstance(attention_mask, Batch) else attention_mask


def _moves(pos: Any, attention_mask: Any, owner: str) -> bool:
    """Whether a position of the text stands elsewhere in the array, in any prompt, than it would without padding."""
    places = np.asarray(_places(pos, attention_mask, owner))
    return bool((places != np.asarray(pos) % np.shape(_mask_in(attention_mask))[1]).any())


def _knows_padding(metric: Any) -> bool:
    """Whether a metric, called on padded logits, counts in the text; of a user's own that is not known."""
    if not isinstance(metric, _Metric):
        return True
    return metric._is_placed or getattr(metric, "attention_mask", None) is not None


def _sizes(logits: Any, owner: str) -> tuple[int, int]:
    """Number of prompts and of tokens in the vocabulary."""
    if logits.ndim != 3:
        raise InputError(
            f"{owner} got logits of {logits.ndim} axes; it takes [batch, pos, d_vocab], as model(tokens) gives them."
        )
    return len(logits), logits.d_vocab if isinstance(logits, LazyLogits) else logits.shape[2]


def _each_prompt(ids: Any, batch: int, d_vocab: int, owner: str) -> Any:
    """Token ids as ``[batch, k]``."""
    if not isinstance(ids, Tracer):
        check_indices(ids, d_vocab, "token")
        if np.size(ids) and int(np.min(ids)) < 0:
            raise InputError(f"{owner} got the token id {int(np.min(ids))}; ids run from 0 to {d_vocab - 1}.")
    if ids.ndim == 0:
        return jnp.broadcast_to(ids, (batch, 1)) if isinstance(ids, jax.Array) else np.broadcast_to(ids, (batch, 1))
    if ids.ndim > 2 or len(ids) != batch:
        raise InputError(
            f"{owner} got token ids of shape {tuple(ids.shape)} for {batch} prompts: give one id, one for each prompt "
            f"[{batch}], or several for each prompt [{batch}, k]."
        )
    return ids if ids.ndim == 2 else ids[:, None]


def _check_pos(logits: Any, pos: Any, owner: str) -> None:
    """Refuses positions that do not exist; lazy logits do so themselves."""
    if not isinstance(pos, int) and len(pos) != len(logits):
        raise InputError(
            f"{owner} got {len(pos)} positions for {len(logits)} prompts: give one for all, or one for each."
        )
    if not isinstance(logits, LazyLogits):
        check_indices(pos, logits.shape[1], "position")


def _wide(array: Any) -> jax.Array:
    """An array of floats of at least 32 bits."""
    array = jnp.asarray(array)
    return array.astype(widened(array.dtype) if jnp.issubdtype(array.dtype, jnp.floating) else jnp.float32)


def _picked(logits: Any, ids: Any, pos: Any, owner: str) -> jax.Array:
    """The logits of ``ids`` at ``pos``, averaged over a prompt's tokens ``[batch]``."""
    batch, d_vocab = _sizes(logits, owner)
    ids = _each_prompt(ids, batch, d_vocab, owner)
    _check_pos(logits, pos, owner)
    rows = np.arange(batch)[:, None]
    picked = _wide(logits[rows, pos if isinstance(pos, int) else pos[:, None], ids])
    return _at_known_positions(_where_known(picked, ids, 0, d_vocab), logits, pos).mean(axis=-1)


def _rows(logits: Any, pos: Any, owner: str) -> jax.Array:
    """All logits at ``pos`` ``[batch, d_vocab]``."""
    batch, _ = _sizes(logits, owner)
    _check_pos(logits, pos, owner)
    if isinstance(pos, int):
        return _wide(logits[:, pos])
    return _at_known_positions(_wide(logits[np.arange(batch), pos]), logits, pos)


def _picked_from_rows(rows: jax.Array, ids: Any) -> jax.Array:
    return _where_known(jnp.take_along_axis(rows, jnp.asarray(ids), axis=-1), ids, 0, rows.shape[-1])


def _at_known_positions(picked: jax.Array, logits: Any, pos: Any) -> jax.Array:
    if isinstance(pos, int) or isinstance(logits, LazyLogits):  # lazy logits are of positions that were looked at
        return picked
    return _where_known(picked, pos[:, None], -logits.shape[1], logits.shape[1])


def _where_known(picked: jax.Array, numbers: Any, low: int, high: int) -> jax.Array:
    """NaN where a number under trace, which could not be checked, is of nothing: JAX takes the nearest entry."""
    if not isinstance(numbers, Tracer):
        return picked
    return jnp.where(jnp.broadcast_to((numbers >= low) & (numbers < high), picked.shape), picked, jnp.nan)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class LogitDiff(_Metric):
    """Logit of ``answer`` minus logit of ``wrong`` at one position.

    Args:
        answer: token id, one for each prompt ``[batch]``, or several for each ``[batch, k]``, which are averaged.
        wrong: the same for the wrong answer.
        pos: the position read, or one for each prompt ``[batch]``. A sweep counts it in each prompt's text; of logits
            alone it is a place in the array, and :meth:`in_text` counts it in the text.

    >>> logits = jnp.arange(24.0).reshape(2, 3, 4)
    >>> LogitDiff(answer=[3, 2], wrong=0)(logits)
    Array([3., 2.], dtype=float32)
    """

    answer: Any
    wrong: Any
    pos: Any = -1

    def __post_init__(self) -> None:
        self._checked_ids("answer")
        self._checked_ids("wrong")
        self._checked_pos(self.pos)

    def __call__(self, logits: Logits) -> Float[Array, " batch"]:
        """Returns the difference for each prompt ``[batch]``."""
        answer = _picked(logits, self.answer, self.pos, "LogitDiff(answer=...)")
        return answer - _picked(logits, self.wrong, self.pos, "LogitDiff(wrong=...)")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Logit(_Metric):
    """Logit of ``answer`` at one position. Arguments as in :class:`LogitDiff`."""

    answer: Any
    pos: Any = -1

    def __post_init__(self) -> None:
        self._checked_ids("answer")
        self._checked_pos(self.pos)

    def __call__(self, logits: Logits) -> Float[Array, " batch"]:
        """Returns the logit for each prompt ``[batch]``."""
        return _picked(logits, self.answer, self.pos, "Logit(answer=...)")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class LogProb(_Metric):
    """Log-probability of ``answer`` at one position, in nats. Arguments as in :class:`LogitDiff`.

    >>> jnp.exp(LogProb(answer=1)(jnp.zeros((1, 3, 4))))
    Array([0.25], dtype=float32)
    """

    answer: Any
    pos: Any = -1

    def __post_init__(self) -> None:
        self._checked_ids("answer")
        self._checked_pos(self.pos)

    def __call__(self, logits: Logits) -> Float[Array, " batch"]:
        """Returns the log-probability for each prompt ``[batch]``, averaged over a prompt's tokens."""
        owner = "LogProb(answer=...)"
        rows = _rows(logits, self.pos, owner)
        ids = _each_prompt(self.answer, rows.shape[0], rows.shape[1], owner)
        return _picked_from_rows(rows, ids).mean(axis=-1) - jax.nn.logsumexp(rows, axis=-1)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class KL(_Metric):
    """How far the run's next-token distribution is from a reference run's: ``KL(base || run)``, in nats.

    Args:
        base: logits or log-probabilities of the reference run, ``[batch, pos, d_vocab]``, of which only what is read
            is kept, as log-probabilities; or of the read position alone, ``[batch, d_vocab]``.
        pos: the position compared, one for each prompt ``[batch]``, or ``None`` for the mean over positions.
        attention_mask: ``[batch, pos]``, 0 at padding (or a ``Batch``): ``pos`` then counts in each prompt's text, and
            with ``pos=None`` padding does not count. For padded prompts it has to be given.

    >>> logits = jnp.arange(24.0).reshape(2, 3, 4)
    >>> KL(logits)(logits)
    Array([0., 0.], dtype=float32)
    """

    base: Any
    pos: Any = -1
    attention_mask: Any = None

    def __post_init__(self) -> None:
        self._set("attention_mask", _mask_in(self.attention_mask))
        if self.pos is not None:
            self._checked_pos(self.pos)
            if self.attention_mask is not None:
                self._set("pos", _places(self.pos, self.attention_mask, "KL"))
        base, all_positions = self.base, self.pos is None
        if base.ndim not in ((3,) if all_positions else (2, 3)):
            wanted = "[batch, pos, d_vocab]" if all_positions else "[batch, pos, d_vocab] or [batch, d_vocab]"
            raise InputError(f"KL(base=...) got an array of {base.ndim} axes; give the logits of a run, {wanted}.")
        if not all_positions and base.ndim == 3:
            base = _rows(base if isinstance(base, LazyLogits) else jnp.asarray(base), self.pos, "KL(base=...)")
        self._set("base", jax.nn.log_softmax(_wide(base)))

    def in_text(self, attention_mask: Any) -> Any:
        if self.attention_mask is not None:
            return self
        if self.pos is not None and not _moves(self.pos, attention_mask, "KL"):
            return self
        if self.pos is not None:
            raise InputError(
                "KL(base) took the base's logits at a place of the array, and these prompts are padded: say where, "
                "KL(base, attention_mask=batch.mask), so that pos counts in each prompt's text."
            )
        metric = object.__new__(type(self))
        for name, value in (self._values() | {"attention_mask": _mask_in(attention_mask)}).items():
            metric._set(name, value)
        return metric

    def __call__(self, logits: Logits) -> Float[Array, " batch"]:
        """Returns the divergence for each prompt ``[batch]``."""
        _sizes(logits, "KL")
        rows = _wide(logits) if self.pos is None else _rows(logits, self.pos, "KL")
        if rows.shape != self.base.shape:
            raise InputError(
                f"KL compares logits of shape {rows.shape} with the base's {self.base.shape}: run both on prompts of "
                "equally many tokens."
            )
        base = self.base.astype(rows.dtype)
        terms = jnp.exp(base) * (base - jax.nn.log_softmax(rows))
        divergence = jnp.where(base == -jnp.inf, 0, terms).sum(axis=-1)
        if self.pos is not None:
            return divergence
        mask = self.attention_mask
        return _mean_where(divergence, None if mask is None else _mask_of(mask, divergence.shape))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Loss(_Metric):
    """Mean cross entropy of a prompt's next tokens, in nats.

    Args:
        tokens: the run's tokens ``[batch, pos]``, or the ``Batch`` that was run; position ``p`` is scored on predicting
            token ``p + 1``. Pairs whose next token is -100 do not count.
        attention_mask: ``[batch, pos]``, 0 at padding; pairs that touch padding do not count. A sweep knows it.
    """

    tokens: Any
    attention_mask: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.tokens, Batch):
            self._set("attention_mask", self.tokens.mask if self.attention_mask is None else self.attention_mask)
            self._set("tokens", self.tokens.tokens)
        self._checked_ids("tokens")

    def in_text(self, attention_mask: Any) -> Any:
        return self if self.attention_mask is not None else Loss(self.tokens, _mask_in(attention_mask))

    def __call__(self, logits: Logits) -> Float[Array, " batch"]:
        """Returns the mean loss of each prompt ``[batch]``."""
        batch, d_vocab = _sizes(logits, "Loss")
        if self.tokens.ndim != 2 or self.tokens.shape != (batch, logits.shape[1]) or self.tokens.shape[1] < 2:
            raise InputError(
                f"Loss(tokens=...) has shape {tuple(self.tokens.shape)}; the logits are of {batch} prompts of "
                f"{logits.shape[1]} tokens. Give the tokens that were run, [batch, pos], at least two a prompt."
            )
        rows = _wide(logits[:, :-1])
        mask = self.attention_mask
        mask = None if mask is None else _mask_of(mask, self.tokens.shape)
        following, counted = next_tokens(self.tokens, mask, d_vocab)
        check_labels(jax.ShapeDtypeStruct((batch, logits.shape[1], d_vocab), jnp.float32), self.tokens)
        picked = jnp.take_along_axis(rows, following[..., None], axis=-1, mode="fill")[..., 0]
        return _mean_where(jax.nn.logsumexp(rows, axis=-1) - picked, counted)


def _mask_of(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """An attention mask as booleans ``[batch, pos]``."""
    if mask.shape != shape:
        raise InputError(f"The attention mask has shape {tuple(mask.shape)}; these prompts need {shape}.")
    return jnp.asarray(read_mask(mask))


def _mean_where(values: jax.Array, counted: jax.Array | None) -> jax.Array:
    """Mean over the positions that count ``[batch]``."""
    if counted is None:
        return values.mean(axis=-1)
    return jnp.where(counted, values, 0).sum(axis=-1) / counted.sum(axis=-1).astype(values.dtype)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Normalized(_Metric):
    """A metric on the scale where the corrupted run has 0 and the clean run 1.

    Denoising: 0 is a patch that does nothing, 1 one that restores all of the behaviour. Noising: 1 is a patch that
    does nothing, 0 one that destroys it.

    Args:
        metric: any metric; a pytree, if this is to be one.
        clean: the metric of the clean run, one number or one for each prompt ``[batch]``; or the run's logits.
        corrupted: the same of the corrupted run.

    Raises:
        InputError: both runs have the same metric, so there is no scale.

    >>> clean, corrupted = jnp.ones((1, 2, 3)).at[..., 0].set(5.0), jnp.ones((1, 2, 3))
    >>> metric = Normalized(LogitDiff(0, 1), clean, corrupted)
    >>> float(metric(corrupted)[0]), float(metric(clean)[0])
    (0.0, 1.0)
    """

    metric: Any
    clean: Any
    corrupted: Any
    _read_array = False

    def in_text(self, attention_mask: Any) -> Any:
        if not isinstance(self.metric, InText):
            return self
        pos = getattr(self.metric, "pos", None)
        if self._read_array and (pos is None or _moves(pos, attention_mask, "Normalized")):
            raise InputError(
                "Normalized took its metric of logits of padded prompts, whose padding it did not know: give it "
                "numbers, clean=metric.in_text(batch)(logits), or metric.in_text(batch) as its metric."
            )
        return dataclasses.replace(self, metric=self.metric.in_text(attention_mask))

    def __post_init__(self) -> None:
        read = 3 in (np.ndim(self.clean), np.ndim(self.corrupted))
        self._set("_read_array", read and not _knows_padding(self.metric))
        for name in ("clean", "corrupted"):
            value = getattr(self, name)
            value = _wide(self.metric(value) if np.ndim(value) == 3 else value)
            self._set(name, value)
        if not isinstance(self.clean - self.corrupted, Tracer) and np.any(self.clean == self.corrupted):
            raise InputError(
                f"Normalized got the same metric for the clean and the corrupted run ({self.clean}): nothing to "
                "normalise by."
            )

    def __call__(self, logits: Logits) -> Any:
        """Returns ``(metric - corrupted) / (clean - corrupted)``."""
        value = _wide(self.metric(logits))
        clean, corrupted = (
            jnp.broadcast_to(run.astype(value.dtype), value.shape) for run in (self.clean, self.corrupted)
        )
        return (value - corrupted) / (clean - corrupted)
