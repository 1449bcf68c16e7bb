"""Evaluates any metric on many runs at once, from their final residual streams."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, TljaxError
from tljax.memory import WORKING_BYTES
from tljax.model.metrics import UNTRACEABLE, as_numbers, check_metric, is_pytree, read_padding
from tljax.patching.metrics.lazy_logits import LazyLogits
from tljax.patching.metrics.metrics import DeclaredMetric
from tljax.patching.metrics.reads import FEW, PositionNotKept, Reads, unembed
from tljax.processes import as_numpy, fetch
from tljax.scale.batch import on_devices
from tljax.sizes import chunks, power_of_two_within
from tljax.typing import Params

How = Literal["compiled", "replayed", "batched", "plain"]
_Handed = Literal["views", "rows", "array"]
"""The form of logits a metric gets: lazy with lazy rows, lazy with rows that are arrays, or a plain array."""

_T = TypeVar("_T")


class Measure:
    """A metric, prepared to be evaluated on many runs of the same prompts.

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
        how: how it is evaluated, one of the ways above.
        positions: the positions that the metric reads, sorted; ``None`` if it may read any.

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
        budget: int = WORKING_BYTES,
    ) -> None:
        check_metric(metric)
        self.metric, self.cfg, self.budget = metric, cfg, budget
        self.params = {name: params[name] for name in ("ln_final", "unembed") if name in params}
        self._base = as_numpy(base)
        self._batch, self._length = self._base.shape[:2]
        compiled = is_pytree(metric) and self._try_compiled()
        if compiled:
            self.how = "compiled"
        else:
            self.baseline, self._handed, self._reads = self._try(partial(self._evaluate, self._base))
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
            InputError: the metric names such a position.
        """
        for read in self._reads.known.values():
            prompts, places = read.prompts, read.positions
            if not read.named and len(np.unique(places)) > 1:  # it may leave padding out itself
                continue
            if (wrong := np.flatnonzero(~text[prompts, places])).size:
                prompt, place = int(prompts.flat[wrong[0]]), int(places.flat[wrong[0]])
                raise read_padding(place, prompt, int(text[prompt].sum()))

    def __call__(self, finals: Any, kept: int | None = None) -> jax.Array:
        """Measures runs.

        Args:
            finals: final residual streams ``[run, batch, pos, d_model]``; with ``kept``, of that position alone
                ``[run, batch, 1, d_model]``.
            kept: the only position in ``finals``.

        Returns:
            The metric of each run, ``[run]`` or ``[run, batch]``.

        Raises:
            PositionNotKept: the metric reads positions other than ``kept``; or, on these runs, other than
                ``positions``, which is then set to ``None``: call again with all positions.
        """
        finals = as_numpy(finals)
        if kept is None and self.positions is not None and len(self.positions) == 1:
            kept = self.positions[0]
            finals = finals[:, :, kept : kept + 1]
        if kept is not None and self.positions != (kept,):
            raise PositionNotKept(f"Only position {kept} was kept, and the metric reads {self.positions or 'all'}.")
        run = {"compiled": self._compiled, "batched": self._batched}.get(self.how, self._run_by_run)
        if not len(finals):
            return jnp.zeros((0, *self.baseline.shape), self.baseline.dtype)
        measured = []
        try:
            for start, size in chunks(len(finals), *self._chunk_sizes(finals)):
                chunk = finals[start : start + size]
                filled = np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), axis=0)])
                measured.append(as_numpy(run(filled, len(chunk), kept))[: len(chunk)])
        except PositionNotKept:
            self.positions = None
            raise
        return jax.device_put(np.concatenate(measured))

    def traced(self, residual: Any) -> jax.Array:
        """Evaluates the metric on one run as part of a trace, to be differentiated.

        Args:
            residual: final residual stream ``[batch, pos, d_model]`` of a run of the same prompts.

        Returns:
            The metric, a number or ``[batch]``.

        Raises:
            InputError: the metric is a Python function that needs numbers, which a trace does not have.
        """
        return traced_metric(self.metric, self.cfg, self.params, residual, self._handed, self._length)

    @property
    def handed(self) -> Literal["views", "rows", "array"]:
        """The form of logits that the metric gets, which :func:`traced_metric` takes."""
        return self._handed

    def gradient(self, final: Any, weights: Any = None) -> jax.Array:
        """Differentiates the metric, summed over prompts, with respect to a run's final residual stream.

        Args:
            final: the stream, ``[batch, pos, d_model]``.
            weights: ``[batch]``, factors of the prompts in the sum; by default 1.

        Returns:
            The gradient, shaped like ``final``.

        Raises:
            InputError: as for :meth:`traced`.
        """
        final = jnp.asarray(final)
        weights = jnp.ones(self.baseline.shape, jnp.float32) if weights is None else jnp.asarray(weights)
        if self.how != "compiled":
            return jax.grad(lambda final: _weighted(self.traced(final), weights))(final)
        only = self.positions[0] if self.positions is not None and len(self.positions) == 1 else None
        part = slice(None) if only is None else slice(only, only + 1)
        metric, length, kept = self._for_position(only)
        static = (self.cfg, self._handed, length, kept)
        return jnp.zeros_like(final).at[:, part].set(_gradient(*static, metric, self.params, final[:, part], weights))

    @property
    def _elements(self) -> int:
        vocab = self.cfg.d_vocab_out
        return self._batch * self._length * vocab if self._reads.anywhere else self._reads.elements(vocab)

    @property
    def _reads_rows(self) -> bool:
        return self._elements > FEW or self._reads.whole_rows

    def _chunk_sizes(self, finals: np.ndarray) -> tuple[int, int]:
        """Returns two numbers of runs to measure at once: a large one, and a small one for the remainder."""
        gathered = sum(read.positions.size for read in self._reads.known.values())
        numbers = self._elements + finals.shape[3] * (self._batch * finals.shape[2] + gathered)
        affordable = power_of_two_within(max(1, self.budget // (numbers * self._base.itemsize)))
        few, many = (8, 64) if self._reads_rows else (64, 512)
        return min(many, affordable), min(few, affordable)

    def _evaluate(self, residual: Any, handed: _Handed, reads: Reads | None = None, **kwargs: Any) -> jax.Array:
        """Evaluates the metric on one run."""
        kwargs = {"length": self._length, **kwargs}
        logits = LazyLogits(self.cfg, self.params, residual, reads=reads, views=handed == "views", **kwargs)
        return _evaluate(self.metric, logits, handed)

    def _try(self, run: Callable[[_Handed, Reads], _T]) -> tuple[_T, _Handed, Reads]:
        """Calls ``run`` with the laziest logits the metric accepts; an error on a plain array is the metric's own."""
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
        """Traces the metric. Returns whether that is possible."""
        base = jax.ShapeDtypeStruct(self._base.shape, self._base.dtype)
        stack = jax.ShapeDtypeStruct((1, *self._base.shape), self._base.dtype)
        try:
            # once with its own numbers, which are checked and tell what is read, and once as compilation sees it
            _, self._handed, self._reads = self._try(
                lambda handed, reads: jax.eval_shape(partial(self._evaluate, handed=handed, reads=reads), base)
            )
            if self._reads.jitted:
                self._follow()
            static = (self.cfg, self._handed, self._length, None)
            jax.eval_shape(partial(_measure, *static), self.metric, self.params, stack)
        except UNTRACEABLE:
            return False
        return True

    def _choose(self) -> How:
        """Chooses how a Python function is evaluated."""
        if not self._reads_rows and not self._reads.jitted:
            return "replayed"
        if self._follow():
            return "batched"
        return "plain" if self._reads_rows else "replayed"

    def _follow(self) -> bool:
        """Finds what the metric reads of any run, whatever its logits are. Returns whether it can be traced."""
        jitted = self._reads.jitted
        with jax.disable_jit(jitted):  # so that reads in functions that the metric compiles are seen
            seen = self._reads_under_trace() or (self._reads_of_base() if jitted else None)
        if seen is not None:
            self._reads = seen
        return (self._reads_under_trace() if jitted else seen) is not None

    def _reads_under_trace(self) -> Reads | None:
        """Returns what the metric reads of traced logits, so of any logits; ``None`` if it cannot be traced."""
        stack = np.broadcast_to(self._base, (min(self._chunk_sizes(self._base[None])), *self._base.shape))
        reads = None
        # eval_shape makes tracers of the metric's own arrays too, vmap only of what depends on the logits
        for trace, argument in ((partial(partial, jax.eval_shape), self._base), (jax.vmap, stack)):
            if reads is None or reads.anywhere:
                reads = Reads()
                try:
                    trace(partial(self._evaluate, handed=self._handed, reads=reads))(argument)
                except Exception:
                    return None
        return reads

    def _reads_of_base(self) -> Reads:
        """Returns what a metric reads of the unpatched run, if it compiles a part of itself and is untraceable."""
        reads = Reads()
        try:
            self._evaluate(self._base, self._handed, reads)
        except Exception:
            reads.anywhere = True
        # inside compiled code, a read of a position not read before is noticed only if a single one was kept
        reads.anywhere |= reads.positions is not None and len(reads.positions) > 1
        return reads

    def _compiled(self, chunk: np.ndarray, count: int, kept: int | None) -> jax.Array:
        metric, length, kept = self._for_position(kept)
        spread_over = on_devices(chunk, self.params)
        return _measure_compiled(self.cfg, self._handed, length, kept, metric, self.params, spread_over)

    def _for_position(self, kept: int | None) -> tuple[Any, int, int | None]:
        """Returns metric, length and kept position for a program that prompts of all lengths share, if there is one."""
        alone = self.metric.of_one_position() if kept is not None and isinstance(self.metric, DeclaredMetric) else None
        return (self.metric, self._length, kept) if alone is None else (alone, 1, 0)

    def _batched(self, chunk: np.ndarray, count: int, kept: int | None) -> jax.Array:
        def one(residual: Any, known: Any) -> jax.Array:
            return self._evaluate(residual, self._handed, kept=kept, known=known, trusted=True)

        return jax.vmap(one)(on_devices(chunk, self.params), self._values(chunk, kept))

    def _run_by_run(self, chunk: np.ndarray, count: int, kept: int | None) -> np.ndarray:
        values, numbers = fetch(self._values(chunk, kept)), []
        for run in range(count):
            known, reads = {key: value[run] for key, value in values.items()}, Reads()
            numbers.append(as_numpy(self._evaluate(chunk[run], self._handed, reads, kept=kept, known=known)))
            if reads.anywhere or not reads.known.keys() <= values.keys():
                self._check_unexpected(reads.positions)
        return np.stack(numbers)

    def _check_unexpected(self, read: tuple[int, ...] | None) -> None:
        if self.positions is not None and (read is None or not set(read) <= set(self.positions)):
            raise PositionNotKept(f"The metric read positions {read}, and {self.positions} of the base run.")

    def _values(self, chunk: np.ndarray, kept: int | None) -> dict[Any, Any]:
        """Computes, for each run of a chunk, the logits that the metric read of the unpatched run."""
        offset = 0 if kept is None else kept
        known = self._reads.known.items()
        rows = {key: on_devices(chunk[:, read.prompts, read.positions - offset], self.params) for key, read in known}
        return {key: unembed(self.cfg, self.params, rows[key], read.tokens) for key, read in known}


def traced_metric(
    metric: Callable[[Any], Any],
    cfg: HookedTransformerConfig,
    params: Params,
    residual: Any,
    handed: _Handed = "views",
    length: int | None = None,
) -> jax.Array:
    """Evaluates a metric on one run as part of a trace, to be differentiated; :meth:`Measure.traced` for any prompts.

    Args:
        metric: the metric, its positions counted in the array.
        cfg: the model's config.
        params: the model's parameters, of which ``ln_final`` and ``unembed`` are used.
        residual: final residual stream ``[batch, pos, d_model]``.
        handed: the form of logits that the metric gets, as a :class:`Measure` of it found.
        length: how many of the stream's positions are logits that the metric sees; all by default.

    Returns:
        The metric, a number or ``[batch]``.

    Raises:
        InputError: the metric is a Python function that needs numbers, which a trace does not have.
    """
    head = {name: params[name] for name in ("ln_final", "unembed") if name in params}
    logits = LazyLogits(cfg, head, residual, length=length, views=handed == "views", trusted=True)
    try:
        return _evaluate(metric, logits, handed)
    except UNTRACEABLE as error:
        raise InputError(
            "The metric cannot be differentiated, because it turns logits into Python numbers or NumPy arrays. "
            "Write it with jax.numpy alone, or use LogitDiff, LogProb or another metric of tljax.patching."
        ) from error


def _evaluate(metric: Callable[[Any], Any], logits: LazyLogits, handed: _Handed) -> jax.Array:
    try:
        value = metric(logits.__jax_array__() if handed == "array" else logits)
    except TljaxError:
        raise
    except Exception as error:
        error.add_note("(raised in the metric)")
        raise
    return as_numbers(value, len(logits))


def _measure(
    cfg: HookedTransformerConfig,
    handed: _Handed,
    length: int,
    kept: int | None,
    metric: Callable[[Any], Any],
    params: Params,
    finals: Any,
) -> jax.Array:
    """Evaluates the metric on each run ``[run, ...]``."""

    def one(residual: Any) -> jax.Array:
        logits = LazyLogits(cfg, params, residual, length=length, kept=kept, views=handed == "views", trusted=True)
        return _evaluate(metric, logits, handed)

    return jax.vmap(one)(finals)


_measure_compiled = jax.jit(_measure, static_argnums=(0, 1, 2, 3))


def _weighted(values: jax.Array, weights: jax.Array) -> jax.Array:
    return (values * weights.astype(values.dtype)).sum()


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _gradient(
    cfg: HookedTransformerConfig,
    handed: _Handed,
    length: int,
    kept: int | None,
    metric: Callable[[Any], Any],
    params: Params,
    final: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Differentiates the weighted sum of a metric with respect to ``final`` ``[batch, pos, d_model]``."""

    def total(final: jax.Array) -> jax.Array:
        return _weighted(_measure(cfg, handed, length, kept, metric, params, final[None])[0], weights)

    return jax.grad(total)(final)
