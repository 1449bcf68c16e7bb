"""Metrics of a run's logits: small pytrees that read only the positions and the tokens they need.

Each is called with logits ``[batch, pos, d_vocab]`` and returns one number a prompt ``[batch]``, in float32 or wider.
Token ids and reference values are leaves, so other tokens never recompile a sweep.

Which sign is good: *denoising* patches clean activations into the corrupted run, so for ``LogitDiff``, ``Logit`` and
``LogProb`` of the clean answer a positive effect restores the behaviour; *noising* patches corrupted activations into
the clean run, and a negative effect destroys it. ``Loss``, and ``KL`` from the clean run, go the other way: they fall
where denoising restores and rise where noising destroys.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError
from tljax.model.losses import check_labels, cross_entropies, divergences, log_probabilities, next_tokens
from tljax.model.metrics import InText
from tljax.model.running import uses_head
from tljax.patching.metrics.arguments import (
    each_prompt,
    mask_in,
    mask_of,
    mean_where,
    moves,
    picked_from_rows,
    picked_logits,
    places_in_text,
    position,
    rows_at,
    sizes,
    token_ids,
    wide,
)
from tljax.patching.metrics.lazy_logits import LazyLogits, reduced
from tljax.text.batch import Batch
from tljax.typing import Params

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer

Logits = jax.Array | np.ndarray | LazyLogits
"""``[batch, pos, d_vocab]``."""


class DeclaredMetric:
    """Base of metrics: frozen dataclasses whose fields are pytree leaves, except a ``pos`` that is an int or None."""

    _is_placed: bool = False
    """Whether :meth:`in_text` has already converted ``pos`` from positions in the text to positions in the array."""

    def in_text(self, attention_mask: Any) -> Any:
        """Returns the same metric with ``pos`` counted in the text of padded prompts: -1 is the last token of each.

        A sweep calls this itself if it knows the padding.

        Args:
            attention_mask: ``[batch, pos]``, 0 at padding; or the :class:`~tljax.Batch` that was run.

        Raises:
            InputError: a position that a prompt does not have.
        """
        pos = getattr(self, "pos", None)
        if pos is None or self._is_placed:
            return self
        placed = dataclasses.replace(self, pos=places_in_text(pos, attention_mask, type(self).__name__))  # type: ignore[type-var]
        return placed._with(_is_placed=True)

    @property
    def reads_stream(self) -> bool:
        """Whether :meth:`of_stream` serves this metric: so of all here, whose reads are known."""
        return True

    def of_stream(self, cfg: HookedTransformerConfig, params: Params, residual: jax.Array) -> Float[Array, " batch"]:
        """Returns the metric of a run from its final residual stream, unembedding what is read, a part at a time.

        Args:
            cfg: the model's config.
            params: the model's parameters, of which ``ln_final`` and ``unembed`` are used.
            residual: the final residual stream, ``[batch, pos, d_model]``.
        """
        return self(LazyLogits(cfg, params, residual, trusted=True))  # type: ignore[operator]

    def of_one_position(self) -> Any:
        """Returns the metric for logits of its only position, ``[batch, 1, d_vocab]``; ``None`` if it reads several."""
        return None if getattr(self, "pos", None) is None else self._with(pos=0)

    def _with(self, **values: Any) -> Any:
        """Returns a copy with other values of fields, which are not checked again."""
        metric = copy.copy(self)
        for name, value in values.items():
            metric._set(name, value)
        return metric

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
        values = dict(zip(names, children, strict=True)) | dict(static)
        return object.__new__(cls)._with(**values, _is_placed=is_placed)

    def _checked_ids(self, name: str) -> None:
        self._set(name, token_ids(getattr(self, name), f"{type(self).__name__}({name}=...)"))

    def _checked_pos(self, pos: Any) -> None:
        self._set("pos", position(pos, type(self).__name__))


def _knows_padding(metric: Any) -> bool:
    """Whether a metric called on padded logits counts positions in the text; assumed of a user's own metric."""
    if not isinstance(metric, DeclaredMetric):
        return True
    return metric._is_placed or getattr(metric, "attention_mask", None) is not None


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class LogitDiff(DeclaredMetric):
    """Logit of ``answer`` minus logit of ``wrong`` at one position.

    Args:
        answer: token id, one for each prompt ``[batch]``, or several for each ``[batch, k]``, which are averaged.
        wrong: the same for the wrong answer.
        pos: the position read, or one for each prompt ``[batch]``. A sweep counts it in each prompt's text. Called on
            logits directly, the metric indexes the array with it; :meth:`in_text` makes it count in the text.

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
        answer = picked_logits(logits, self.answer, self.pos, "LogitDiff(answer=...)")
        return answer - picked_logits(logits, self.wrong, self.pos, "LogitDiff(wrong=...)")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Logit(DeclaredMetric):
    """Logit of ``answer`` at one position. Arguments as in :class:`LogitDiff`."""

    answer: Any
    pos: Any = -1

    def __post_init__(self) -> None:
        self._checked_ids("answer")
        self._checked_pos(self.pos)

    def __call__(self, logits: Logits) -> Float[Array, " batch"]:
        """Returns the logit for each prompt ``[batch]``."""
        return picked_logits(logits, self.answer, self.pos, "Logit(answer=...)")


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class LogProb(DeclaredMetric):
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
        rows = rows_at(logits, self.pos, owner)
        ids = each_prompt(self.answer, rows.shape[0], rows.shape[1], owner)
        return picked_from_rows(rows, ids).mean(axis=-1) - jax.nn.logsumexp(rows, axis=-1)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class KL(DeclaredMetric):
    """How far the run's next-token distribution is from a reference run's: ``KL(base || run)``, in nats.

    Args:
        base: logits or log-probabilities of the reference run, ``[batch, pos, d_vocab]``, or of position ``pos`` alone,
            ``[batch, d_vocab]``. Only the positions compared are kept, as log-probabilities. :meth:`to_run` needs no
            logits of all positions.
        pos: the position compared, one for each prompt ``[batch]``, or ``None`` for the mean over positions.
        attention_mask: ``[batch, pos]``, 0 at padding (or a ``Batch``): ``pos`` then counts in each prompt's text, and
            with ``pos=None`` padding does not count. Give it if prompts are padded.

    >>> logits = jnp.arange(24.0).reshape(2, 3, 4)
    >>> KL(logits)(logits)
    Array([0., 0.], dtype=float32)
    """

    base: Any
    pos: Any = -1
    attention_mask: Any = None

    def __post_init__(self) -> None:
        self._set("attention_mask", mask_in(self.attention_mask))
        if self.pos is not None:
            self._checked_pos(self.pos)
            if self.attention_mask is not None:
                self._set("pos", places_in_text(self.pos, self.attention_mask, "KL"))
        base, all_positions = self.base, self.pos is None
        if base.ndim not in ((3,) if all_positions else (2, 3)):
            wanted = "[batch, pos, d_vocab]" if all_positions else "[batch, pos, d_vocab] or [batch, d_vocab]"
            raise InputError(f"KL(base=...) got an array of {base.ndim} axes; give the logits of a run, {wanted}.")
        if not all_positions and base.ndim == 3:
            base = rows_at(base if isinstance(base, LazyLogits) else jnp.asarray(base), self.pos, "KL(base=...)")
        self._set("base", base if isinstance(base, LazyLogits) and all_positions else log_probabilities(wide(base)))

    @classmethod
    def to_run(cls, model: "HookedTransformer", prompt: Any, pos: Any = None) -> "KL":
        """Returns the divergence from a run of a model, of which no more than the final residual stream is kept.

        With ``pos=None`` the distributions of both runs are made and compared some positions at a time.

        Args:
            model: the model of the reference run, with its hooks; the runs measured may be another model's.
            prompt: as the model takes it. Padding does not count.
            pos: as in :class:`KL`.
        """
        batch = model.to_batch(prompt)
        mask = None if np.asarray(batch.mask).all() else batch.mask
        if uses_head([entry.name for entry in model._hooks.entries]):
            return cls(model(batch), pos, mask)
        stream = model(batch, stop_at_layer=model.cfg.n_layers)
        return cls(LazyLogits(model.cfg.computation, model.params, stream), pos, mask)

    def in_text(self, attention_mask: Any) -> Any:
        if self.attention_mask is not None:
            return self
        if self.pos is not None and not moves(self.pos, attention_mask, "KL"):
            return self
        if self.pos is not None:
            raise InputError(
                "KL(base) took the base's logits at a place of the array, and these prompts are padded: say where, "
                "KL(base, attention_mask=batch.mask), so that pos counts in each prompt's text."
            )
        return self._with(attention_mask=mask_in(attention_mask))

    def __call__(self, logits: Logits) -> Float[Array, " batch"]:
        """Returns the divergence for each prompt ``[batch]``."""
        sizes(logits, "KL")
        rows = logits if self.pos is None else rows_at(logits, self.pos, "KL")
        if rows.shape != self.base.shape:
            raise InputError(
                f"KL compares logits of shape {rows.shape} with the base's {self.base.shape}: run both on prompts of "
                "equally many tokens."
            )
        lazy = isinstance(self.base, LazyLogits)
        divergence = reduced(_divergence_from_logits if lazy else _divergence_from, self.base, rows)
        if self.pos is not None:
            return divergence
        mask = self.attention_mask
        return mean_where(divergence, None if mask is None else mask_of(mask, divergence.shape))


def _divergence_from(base: jax.Array, logits: jax.Array) -> jax.Array:
    log_probs = log_probabilities(wide(logits))
    return divergences(base.astype(log_probs.dtype), log_probs)


def _divergence_from_logits(base: jax.Array, logits: jax.Array) -> jax.Array:
    return _divergence_from(log_probabilities(base), logits)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Loss(DeclaredMetric):
    """Mean cross entropy of a prompt's next tokens, in nats.

    Args:
        tokens: the run's tokens ``[batch, pos]``, or the ``Batch`` that was run; position ``p`` is scored on predicting
            token ``p + 1``. Pairs whose next token is -100 do not count.
        attention_mask: ``[batch, pos]``, 0 at padding; pairs that touch padding do not count. A sweep fills it in.
    """

    tokens: Any
    attention_mask: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.tokens, Batch):
            self._set("attention_mask", self.tokens.mask if self.attention_mask is None else self.attention_mask)
            self._set("tokens", self.tokens.tokens)
        self._checked_ids("tokens")

    def in_text(self, attention_mask: Any) -> Any:
        return self if self.attention_mask is not None else Loss(self.tokens, mask_in(attention_mask))

    def __call__(self, logits: Logits) -> Float[Array, " batch"]:
        """Returns the mean loss of each prompt ``[batch]``."""
        batch, d_vocab = sizes(logits, "Loss")
        if self.tokens.ndim != 2 or self.tokens.shape != (batch, logits.shape[1]) or self.tokens.shape[1] < 2:
            raise InputError(
                f"Loss(tokens=...) has shape {tuple(self.tokens.shape)}; the logits are of {batch} prompts of "
                f"{logits.shape[1]} tokens. Give the tokens that were run, [batch, pos], at least two a prompt."
            )
        mask = self.attention_mask
        mask = None if mask is None else mask_of(mask, self.tokens.shape)
        following, counted = next_tokens(self.tokens, mask, d_vocab)
        check_labels(jax.ShapeDtypeStruct((batch, logits.shape[1], d_vocab), jnp.float32), self.tokens)
        losses = reduced(cross_entropies, logits[:, :-1], following)
        return mean_where(losses, counted)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Normalized(DeclaredMetric):
    """A metric rescaled so that the corrupted run has 0 and the clean run 1.

    Denoising: a patch that does nothing has 0, one that restores all of the behaviour 1. Noising: a patch that does
    nothing has 1, one that destroys the behaviour 0.

    Args:
        metric: any metric; a pytree, if the normalised metric is to be one.
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
        if self._read_array and (pos is None or moves(pos, attention_mask, "Normalized")):
            raise InputError(
                "Normalized took its metric of logits of padded prompts, whose padding it did not know: give it "
                "numbers, clean=metric.in_text(batch)(logits), or metric.in_text(batch) as its metric."
            )
        return dataclasses.replace(self, metric=self.metric.in_text(attention_mask))

    @property
    def reads_stream(self) -> bool:
        return isinstance(self.metric, DeclaredMetric) and self.metric.reads_stream

    def of_one_position(self) -> Any:
        alone = self.metric.of_one_position() if isinstance(self.metric, DeclaredMetric) else None
        return None if alone is None else self._with(metric=alone)

    def __post_init__(self) -> None:
        read = 3 in (np.ndim(self.clean), np.ndim(self.corrupted))
        self._set("_read_array", read and not _knows_padding(self.metric))
        for name in ("clean", "corrupted"):
            value = getattr(self, name)
            value = wide(self.metric(value) if np.ndim(value) == 3 else value)
            self._set(name, value)
        if not isinstance(self.clean - self.corrupted, Tracer) and np.any(self.clean == self.corrupted):
            raise InputError(
                f"Normalized got the same metric for the clean and the corrupted run ({self.clean}): nothing to "
                "normalise by."
            )

    def __call__(self, logits: Logits) -> Any:
        """Returns ``(metric - corrupted) / (clean - corrupted)``."""
        value = wide(self.metric(logits))
        clean, corrupted = (
            jnp.broadcast_to(run.astype(value.dtype), value.shape) for run in (self.clean, self.corrupted)
        )
        return (value - corrupted) / (clean - corrupted)
