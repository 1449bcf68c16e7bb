"""Evaluates any metric on many runs at once, from their final residual streams."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, TljaxError
from tljax.patching.metrics.lazy_logits import LazyLogits
from tljax.patching.metrics.reads import PositionNotKept, Reads, locate, unembed
from tljax.typing import Params

How = Literal["compiled", "replayed", "batched", "plain"]
_Handed = Literal["views", "rows", "array"]
"""What a metric gets: logits whose rows are lazy too, logits that give rows as arrays, or a plain array."""

_T = TypeVar("_T")
_FEW = 4096
_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class Measure:
    """A metric, made ready for many runs of the same prompts.

    The metric is tried once on the unpatched run, which shows what it reads. Then

    - a pytree (such as ``LogitDiff``) is *compiled*, with itself as an argument: other numbers in it compile nothing;
    - a Python function that reads a few logits is *replayed*: what it reads is computed for all runs in one program,
      and the function is called on those values run by run, so it may do anything;
    - one that reads whole rows is *batched* by ``jax.vmap``, operation by operation, so that a new function compiles
      nothing new; or, if it cannot be traced, called run by run on rows computed together (*plain*).

    Args:
        metric: takes logits ``[batch, pos, d_vocab_out]``, returns one number, or one for each prompt ``[batch]``.
        cfg: the model's config.
        params: the model's parameters, of which ``ln_final`` and ``unembed`` are used.
        base: final residual stream of the unpatched run, ``[batch, pos, d_model]``.
        budget: bytes that the logits of runs measured together may take.

    Attributes:
        baseline: the metric of the unpatched run, a number or ``[batch]``.
        how: which of the four ways it is.
        positions: the positions that the metric reads, sorted; ``None`` if it may be any.

    Raises:
        InputError: the metric returns something else, or reads a token or a position that does not exist.
    """

    baseline: jax.Array
    how: How
    positions: tuple[int, ...] | None
    _handed: _Handed
    _reads: Reads

    def __init__(
        self,
        metric: Any,
        cfg: HookedTransformerConfig,
        params: Params,
        base: Any,
        *,
        budget: int = 256 * 2**20,
    ) -> None:
        if not callable(metric):
            raise InputError(f"A metric is a function of the logits, such as LogitDiff(answer, wrong); got {metric!r}.")
        self.metric, self.cfg, self.budget = metric, cfg, budget
        self.params = {name: params[name] for name in ("ln_final", "unembed") if name in params}
        self._base = np.asarray(base)
        self._batch, self._length = self._base.shape[:2]
        compiled = _is_pytree(metric) and self._try_compiled()
        if compiled:
            self.how = "compiled"
        else:
            value, self._handed, self._reads = self._try(partial(self._evaluate, self._base))
            self.baseline = value
            self._follow()
            self.how = self._choose()
        self.positions = self._reads.positions
        if compiled:
            self.baseline = self(self._base[None])[0]

    @property
    def flops(self) -> float:
        """FLOPs spent on unembedding one run."""
        return 2.0 * self.cfg.d_model * self._elements

    def check_padding(self, text: np.ndarray) -> None:
        """Refuses a metric that names a position where a prompt has padding.

        Args:
            text: ``[batch, pos]``, ``False`` at padding.

        Raises:
            InputError: it does.
        """
        for batch, pos, _ in self._reads.parts.values():
            if isinstance(pos, range) and len(pos) > 1:  # it may leave padding out itself
                continue
            prompts = np.asarray(batch)
            if isinstance(batch, range) and not isinstance(pos, int):
                prompts = prompts[:, None]
            prompts, places = np.broadcast_arrays(prompts, np.asarray(pos))
            if (wrong := np.flatnonzero(~text[prompts, places])).size:
                prompt, place = int(prompts.flat[wrong[0]]), int(places.flat[wrong[0]])
                raise InputError(
                    f"The metric reads position {place} of prompt {prompt}, where there is padding: that prompt has "
                    f"{int(text[prompt].sum())} tokens. LogitDiff and the other metrics of tljax.patching count "
                    "positions in each prompt's text; a function indexes the whole array, so give it the places: "
                    "logits[np.arange(batch), last]."
                )

    def __call__(self, finals: Any, kept: int | None = None) -> jax.Array:
        """Measures runs.

        Args:
            finals: final residual streams ``[run, batch, pos, d_model]``; with ``kept``, of that position alone
                ``[run, batch, 1, d_model]``.
            kept: the only position in ``finals``.

        Returns:
            The metric of each run, ``[run]`` or ``[run, batch]``.

        Raises:
            PositionNotKept: the metric reads others than ``kept``, or for these runs reads others than ``positions``,
                which is ``None`` from then on: call again with all positions.
        """
        if kept is None and self.positions is not None and len(self.positions) == 1:
            kept = self.positions[0]
            finals = finals[:, :, kept : kept + 1]
        if kept is not None and self.positions != (kept,):
            raise PositionNotKept(f"Only position {kept} was kept, and the metric reads {self.positions or 'all'}.")
        run = {"compiled": self._compiled, "batched": self._batched}.get(self.how, self._replayed)
        chunks = _chunks(finals, *self._chunk_sizes(finals))
        try:
            measured = [(run(chunk, count, kept), count) for chunk, count in chunks]
        except PositionNotKept:
            self.positions = None
            raise
        if not measured:
            return jnp.zeros((0, *self.baseline.shape), self.baseline.dtype)
        return jax.device_put(np.concatenate([np.asarray(values)[:count] for values, count in measured]))

    @property
    def _elements(self) -> int:
        whole = self._batch * self._length * self.cfg.d_vocab_out
        return whole if self._reads.unfollowed else self._reads.elements

    @property
    def _reads_rows(self) -> bool:
        return self._elements > _FEW or self._reads.whole_rows(self.cfg.d_vocab_out)

    def _chunk_sizes(self, finals: Any) -> tuple[int, int]:
        """How many runs are measured at once: many, and few for what is left over."""
        width = finals.shape[3]
        numbers = self._elements + width * (self._batch * finals.shape[2] + len(self._reads.parts))
        affordable = max(1, self.budget // (numbers * self._base.itemsize))
        few, many = (8, 64) if self._reads_rows else (64, 512)
        affordable = 1 << (affordable.bit_length() - 1)
        return min(many, affordable), min(few, affordable)

    def _evaluate(self, residual: Any, handed: _Handed, reads: Reads | None = None, **kwargs: Any) -> jax.Array:
        """The metric of one run."""
        kwargs = {"length": self._length, **kwargs}
        logits = LazyLogits(self.cfg, self.params, residual, reads=reads, views=handed == "views", **kwargs)
        return _evaluate(self.metric, logits, handed)

    def _try(self, run: Callable[[_Handed, Reads], _T]) -> tuple[_T, _Handed, Reads]:
        """Runs with the laziest logits that the metric can take; what it raises on a plain array is its own error."""
        ways: tuple[_Handed, ...] = ("views", "rows", "array")
        for handed in ways:
            reads = Reads()
            try:
                return run(handed, reads), handed, reads
            except TljaxError:
                raise
            except Exception:
                if handed == ways[-1]:
                    raise
        raise AssertionError

    def _try_compiled(self) -> bool:
        """Traces the metric; whether that can be done."""
        base = jax.ShapeDtypeStruct(self._base.shape, self._base.dtype)
        stack = jax.ShapeDtypeStruct((1, *self._base.shape), self._base.dtype)
        try:
            # once with its own numbers, which are checked and tell what is read, and once as compilation sees it;
            # the logits are abstract, so positions that are known here do not depend on them
            _, self._handed, self._reads = self._try(
                lambda handed, reads: jax.eval_shape(partial(self._evaluate, handed=handed, reads=reads), base)
            )
            self._follow()
            static = (self.cfg, self._handed, self._length, None)
            jax.eval_shape(partial(_measure, *static), self.metric, self.params, stack)
        except _UNTRACEABLE:
            return False
        return True

    def _reads_of_any_run(self) -> Reads | None:
        """What the metric reads while logits are tracers, so whatever they are; ``None`` if it cannot be traced."""
        stack = np.broadcast_to(self._base, (min(self._chunk_sizes(self._base[None])), *self._base.shape))
        # eval_shape makes tracers of the metric's own arrays too, vmap only of what depends on the logits
        for trace, argument in ((partial(partial, jax.eval_shape), self._base), (jax.vmap, stack)):
            reads = Reads()
            try:
                trace(partial(self._evaluate, handed=self._handed, reads=reads))(argument)
            except Exception:
                return None
            if not reads.unfollowed:
                break
        return reads

    def _follow(self) -> None:
        """Where the logits went into a compiled function, runs it uncompiled to see what it reads of them."""
        if not self._reads.compiled:
            return
        with jax.disable_jit():
            followed = self._reads_of_any_run()
            if followed is None:
                followed = Reads()
                try:
                    self._evaluate(self._base, self._handed, followed)
                except Exception:
                    followed.unfollowed = True
                # in compiled code, a read of another position than before shows only where one was kept
                followed.unfollowed |= followed.positions is not None and len(followed.positions) > 1
        followed.compiled = True
        self._reads = followed

    def _choose(self) -> How:
        """How a Python function is evaluated."""
        if not self._reads_rows and not self._reads.compiled:
            return "replayed"
        reads = self._reads_of_any_run()
        if reads is None:
            return "plain" if self._reads_rows else "replayed"
        self._reads = reads if not reads.compiled else self._reads
        return "batched"

    def _frame(self, kept: int | None) -> tuple[int, int | None]:
        """How many positions there are, and the kept one: prompts of all lengths share a program if they can."""
        offset = self._reads.offset
        return (self._length, kept) if kept is None or offset is None else (-offset, 0)

    def _compiled(self, chunk: Any, count: int, kept: int | None) -> jax.Array:
        return _measure_compiled(self.cfg, self._handed, *self._frame(kept), self.metric, self.params, chunk)

    def _batched(self, chunk: Any, count: int, kept: int | None) -> jax.Array:
        return jax.vmap(partial(self._evaluate, handed=self._handed, kept=kept, trusted=True))(chunk)

    def _replayed(self, chunk: Any, count: int, kept: int | None) -> np.ndarray:
        values = self._values(chunk, kept)
        numbers = []
        for run in range(count):
            known, reads = {key: jnp.asarray(value[run]) for key, value in values.items()}, Reads()
            number = self._evaluate(chunk[run], self._handed, reads, kept=kept, known=known)
            numbers.append(np.asarray(number))
            if reads.unfollowed or not reads.parts.keys() <= values.keys():
                self._check_unexpected(reads)
        return np.stack(numbers)

    def _check_unexpected(self, reads: Reads) -> None:
        if self.positions is not None and not set(reads.positions or range(self._length)) <= set(self.positions):
            raise PositionNotKept(f"The metric read positions {reads.positions}, and {self.positions} of the base run.")

    def _values(self, chunk: Any, kept: int | None) -> dict[Any, np.ndarray]:
        """What the metric read of the unpatched run, for each run of a chunk."""
        located = {key: locate(parts, kept) for key, parts in self._reads.parts.items()}
        single = [key for key, parts in located.items() if all(isinstance(part, int) for part in parts)]
        values = {}
        if single:
            indices = np.asarray([located.pop(key) for key in single], np.int32).T
            size = 4
            while size < len(single):
                size *= 4
            picks = np.pad(indices, ((0, 0), (0, size - len(single))), mode="edge")
            columns = np.asarray(unembed(self.cfg, self.params, chunk, (picks[0], picks[1], picks[2]), each=True))
            values = {key: columns[:, n] for n, key in enumerate(single)}
        for key, parts in located.items():
            values[key] = np.asarray(unembed(self.cfg, self.params, chunk, parts, each=True))
        return values


def _is_pytree(metric: Any) -> bool:
    """Whether a metric is a pytree of arrays and numbers."""
    if jax.tree_util.all_leaves([metric]):
        return False
    kinds = jax.Array | np.ndarray | np.generic | bool | int | float
    return all(isinstance(leaf, kinds) for leaf in jax.tree.leaves(metric))


def _evaluate(metric: Callable[[Any], Any], logits: LazyLogits, handed: _Handed) -> jax.Array:
    try:
        value = metric(logits.__jax_array__() if handed == "array" else logits)
    except TljaxError:
        raise
    except Exception as error:
        error.add_note("(raised in the metric)")
        raise
    return _as_numbers(value, len(logits))


def _as_numbers(value: Any, batch: int) -> jax.Array:
    """What a metric returned, as floats.

    Raises:
        InputError: it is neither a number nor one number a prompt.
    """
    wanted = "A metric returns one number, or one for each prompt [batch]"
    if value is None or isinstance(value, list | tuple | dict | str):
        raise InputError(f"The metric returned {value!r}. {wanted}: return the number.")
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"The metric returned a {type(value).__name__}. {wanted}: return the number.") from error
    if array.shape not in ((), (batch,)):
        raise InputError(
            f"The metric returned an array of shape {array.shape} for {batch} prompts. {wanted}: index the position "
            "and the token, or average."
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise InputError(f"The metric returned complex numbers. {wanted}: take the real part or the magnitude.")
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)


def _measure(
    cfg: HookedTransformerConfig,
    handed: _Handed,
    length: int,
    kept: int | None,
    metric: Callable[[Any], Any],
    params: Params,
    finals: Any,
) -> jax.Array:
    """The metric of each run ``[run, ...]``."""

    def one(residual: Any) -> jax.Array:
        logits = LazyLogits(cfg, params, residual, length=length, kept=kept, views=handed == "views", trusted=True)
        return _evaluate(metric, logits, handed)

    return jax.vmap(one)(finals)


_measure_compiled = jax.jit(_measure, static_argnums=(0, 1, 2, 3))


def _chunks(finals: Any, many: int, few: int) -> Iterator[tuple[Any, int]]:
    """Runs in chunks of two sizes, the last one filled up, and how many of a chunk's runs are real."""
    if isinstance(finals, jax.Array) and all(device.platform == "cpu" for device in finals.devices()):
        finals = np.asarray(finals)
    start, total = 0, finals.shape[0]
    while start < total:
        size = many if total - start > many // 2 else few
        yield _take(finals, start, size), min(size, total - start)
        start += size


def _take(finals: Any, start: int, size: int) -> Any:
    if start == 0 and finals.shape[0] == size:
        return finals
    if isinstance(finals, jax.Array):
        return _take_on_device(finals, start, size)
    chunk = finals[start : start + size]
    missing = size - len(chunk)
    return np.concatenate([chunk, np.broadcast_to(chunk[-1:], (missing, *chunk.shape[1:]))]) if missing else chunk


@partial(jax.jit, static_argnums=2)
def _take_on_device(finals: jax.Array, start: int, size: int) -> jax.Array:
    return finals[jnp.minimum(start + jnp.arange(size), finals.shape[0] - 1)]
