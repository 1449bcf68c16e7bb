"""``train_dictionary`` and ``train_dictionaries``: one dictionary, or a stack that shares each batch."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import checks
from tljax.dictionaries.crosscoder import Crosscoder
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.training.batches import Pair, batch_function, digest, pairs
from tljax.dictionaries.training.checkpoint import FILE, Run, load_run, save_run
from tljax.dictionaries.training.coefficients import Numbers, check_stack, numbers_of, structure_of
from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.finish import finished
from tljax.dictionaries.training.initial import initial_parameters
from tljax.dictionaries.training.preparation import Preparation, prepare
from tljax.dictionaries.training.step import (
    Metrics,
    TrainingState,
    initial_state,
    members_at_once,
    train_step,
    train_step_of_stack,
)
from tljax.errors import ConfigError, DictionaryError, InputError, TrainingError

OnLog = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The result of training one dictionary.

    Attributes:
        dictionary: what was trained, for raw activations (norm scale and whitening folded in, ``batchtopk`` as
            ``jumprelu``): a :class:`~tljax.dictionaries.Dictionary`, or a :class:`~tljax.dictionaries.Crosscoder`.
        history: an array with one entry for each step, by name: ``loss`` and its terms, ``l0``, ``explained_variance``,
            ``dead_features``, ``lr``, ``grad_norm``, coefficients, ``topk_threshold``.
        state: the state after the last step, in units of training.
        cfg: the settings.
        preparation: what was done to activations before training.
    """

    dictionary: Any
    history: dict[str, np.ndarray]
    state: TrainingState
    cfg: TrainingConfig
    preparation: Preparation


@checks.typed
def train_dictionary(
    cfg: TrainingConfig,
    batches: Any,
    *,
    steps: int,
    batch_size: int = 4096,
    start: Any = None,
    preparation: Preparation | None = None,
    optimizer: optax.GradientTransformation | None = None,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    save_every: int | None = None,
    log_every: int = 100,
    on_log: OnLog | None = None,
) -> TrainingResult:
    """Trains a sparse autoencoder, transcoder or crosscoder.

    A step is one compiled program that reuses the memory of the state; nothing comes back to the host between two
    entries of the log. A second run with other numbers (``k``, coefficients, learning rate) compiles nothing.

    Args:
        cfg: the settings.
        batches: a function from the step (0, 1, ...) to activations ``[tokens, d_in]``, such as the ``batch`` of a
            :class:`~tljax.harvest.Reader`, or all rows in memory, ``[rows, d_in]``. Transcoders take pairs, crosscoders
            ``[tokens, n, d_in]``; a mapping from points to arrays is read at the config's taps. Because a batch depends
            on its step alone, an interrupted run goes on exactly as it would have.
        steps: optimizer steps.
        batch_size: rows of a batch, where ``batches`` are rows in memory.
        start: parameters to start from, in units of training; ``None`` draws them. ``topk_threshold`` may be among
            them.
        preparation: what is done to activations first, from :func:`prepare` or an earlier result; ``None`` estimates it
            from the first batches.
        optimizer: used instead of Adam with the config's learning rate and clipping.
        directory: where the state is saved, and beside it the dictionary so far in SAELens's layout, if SAELens has
            such dictionaries: ``Dictionary.load(directory)`` and SAELens read it. ``None`` saves nothing.
        resume: go on from the state in ``directory`` if there is one. The result has the same bits as that of an
            uninterrupted run.
        save_every: steps between saves; ``None`` saves at the end only.
        log_every: steps between the moments when losses are fetched and checked.
        on_log: called then with the metrics of the latest step, by name, and ``step``, the number of steps done.

    Returns:
        The dictionary, and the history of the losses.

    Raises:
        ConfigError: ``directory`` holds a state and ``resume`` is off.
        InputError: a batch has another form or width than the config says.
        CheckpointError: the state is damaged or belongs to another run; says what differs.
        TrainingError: the loss stopped being finite, or a batch was not; names the step.

    >>> rows = np.random.default_rng(0).standard_normal((512, 8), np.float32)
    >>> cfg = TrainingConfig(architecture="batchtopk", d_in=8, d_sae=16, k=2, lr=1e-2)
    >>> result = train_dictionary(cfg, rows, steps=20, batch_size=64)
    >>> result.dictionary, bool(result.history["loss"][-1] < result.history["loss"][0])
    (Dictionary(jumprelu, 8 -> 16 -> 8), True)
    """
    options = _Options(steps, batch_size, preparation, optimizer, directory, resume, save_every, log_every, on_log)
    return _train([cfg], batches, None if start is None else [start], options, stacked=False)[0]


@checks.typed
def train_dictionaries(
    cfgs: Sequence[TrainingConfig],
    batches: Any,
    *,
    steps: int,
    batch_size: int = 4096,
    start: Any = None,
    preparation: Preparation | None = None,
    optimizer: optax.GradientTransformation | None = None,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    save_every: int | None = None,
    log_every: int = 100,
    on_log: OnLog | None = None,
) -> tuple[TrainingResult, ...]:
    """Trains a stack of dictionaries on the same batches: a sweep of ``k``, of coefficients or of seeds.

    One compiled step trains all members on each batch, which is read, scaled and moved to the device once. Members may
    differ in every number of the config; they share what shapes the program: architecture, sizes, kinds of schedule.

    Args:
        cfgs: the settings of each member.
        batches: see :func:`train_dictionary`.
        steps: optimizer steps.
        batch_size: rows of a batch, where ``batches`` are rows in memory.
        start: parameters to start from, one mapping for each member.
        preparation: see :func:`train_dictionary`.
        optimizer: used instead of Adam with the config's learning rate and clipping.
        directory: where the state of the stack is saved, and in ``directory/0``, ``directory/1``, ... the members in
            SAELens's layout.
        resume: see :func:`train_dictionary`.
        save_every: steps between saves; ``None`` saves at the end only.
        log_every: steps between the moments when losses are fetched and checked.
        on_log: called then with the latest metrics, each ``[member]``, and ``step``.

    Returns:
        A result for each member.

    Raises:
        ConfigError: the members cannot share a program; names the field.
        InputError, CheckpointError, TrainingError: see :func:`train_dictionary`.

    >>> rows = np.random.default_rng(0).standard_normal((256, 8), np.float32)
    >>> cfgs = [TrainingConfig(architecture="topk", d_in=8, d_sae=16, k=k) for k in (1, 2, 4)]
    >>> results = train_dictionaries(cfgs, rows, steps=5, batch_size=64)
    >>> [float(result.history["l0"][-1]) <= k for result, k in zip(results, (1, 2, 4), strict=True)]
    [True, True, True]
    """
    if not cfgs:
        raise ConfigError("cfgs is empty: give the settings of at least one dictionary.")
    check_stack(cfgs)
    options = _Options(steps, batch_size, preparation, optimizer, directory, resume, save_every, log_every, on_log)
    return _train(list(cfgs), batches, start, options, stacked=True)


@dataclasses.dataclass(frozen=True)
class _Options:
    steps: int
    batch_size: int
    preparation: Preparation | None
    optimizer: optax.GradientTransformation | None
    directory: str | os.PathLike[str] | None
    resume: bool
    save_every: int | None
    log_every: int
    on_log: OnLog | None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "log_every"):
            if getattr(self, name) is not None:
                checks.whole(getattr(self, name), name, at_least=1)

    def is_due(self, done: int) -> tuple[bool, bool]:
        """Returns whether to log and whether to save after ``done`` steps."""
        last = done == self.steps
        saves = self.directory is not None and (last or bool(self.save_every and done % self.save_every == 0))
        return last or saves or done % self.log_every == 0, saves


def _train(
    cfgs: list[TrainingConfig], batches: Any, start: Any, options: _Options, *, stacked: bool
) -> tuple[TrainingResult, ...]:
    source = batch_function(batches, options.batch_size, cfgs[0].seed)
    batch = pairs(source, cfgs[0])
    first = batch(0)
    structure = structure_of(cfgs[0], max((cfg.k for cfg in cfgs if cfg.k is not None), default=None))
    numbers = _stack([numbers_of(cfg, options.steps) for cfg in cfgs], stacked)
    run = Run(cfgs, options.steps, options.batch_size, digest(first), "adam" if options.optimizer is None else "given")
    state, preparation, done, history = _begin(cfgs, source, first, start, run, options, stacked)
    pending: list[Metrics] = []

    def results() -> tuple[TrainingResult, ...]:
        numbered = enumerate(cfgs)
        return tuple(_result(state, history, cfg, preparation, number if stacked else None) for number, cfg in numbered)

    while done < options.steps:
        x, y = batch(done)
        state, metrics = _one_step(state, x, y, numbers, preparation, structure, options, stacked)
        pending.append(metrics)
        done += 1
        logs, saves = options.is_due(done)
        if not logs:
            continue
        history = _fetched(history, pending, done)
        pending.clear()
        if options.on_log is not None:
            options.on_log({"step": done, **{name: values[-1] for name, values in history.items()}})
        if saves:
            save_run(Path(os.fspath(options.directory or "")), run, state, preparation, done, history)
            _save_dictionaries(results(), options.directory, stacked)
    return results()


def _save_dictionaries(results: Sequence[TrainingResult], directory: Any, stacked: bool) -> None:
    """Writes the dictionaries of a checkpoint beside its state, each in a folder of its own if there are several."""
    for number, result in enumerate(results):
        if isinstance(result.dictionary, Dictionary):
            with contextlib.suppress(DictionaryError):  # SAELens has no such dictionary
                result.dictionary.save(Path(os.fspath(directory), str(number) if stacked else ""))


def _one_step(
    state: TrainingState, x: Any, y: Any, numbers: Numbers, preparation: Preparation, structure: TrainingConfig,
    options: _Options, stacked: bool,
) -> tuple[TrainingState, Metrics]:  # fmt: skip
    if not stacked:
        return train_step(state, x, y, numbers, preparation, structure, options.optimizer)
    at_once = members_at_once(state.step.shape[0])
    return train_step_of_stack(state, x, y, numbers, preparation, structure, options.optimizer, at_once)


def _begin(
    cfgs: list[TrainingConfig], source: Callable[[int], Any], first: Pair, start: Any, run: Run, options: _Options,
    stacked: bool,
) -> tuple[TrainingState, Preparation, int, dict[str, np.ndarray]]:  # fmt: skip
    """Returns the state to start from, what is done to activations, the steps already done, and their history."""
    saved = options.directory is not None and (Path(options.directory) / FILE).is_file()
    if saved and not options.resume:
        raise ConfigError(
            f"{options.directory} already holds a state of training. Pass resume=True to go on from it, or another "
            "directory."
        )
    if start is not None and len(start) != len(cfgs):
        raise InputError(f"start has parameters of {len(start)} dictionaries for {len(cfgs)} configs.")
    preparation = options.preparation
    if preparation is None:
        preparation = Preparation() if saved else prepare(cfgs[0], source)
    _, target = preparation.apply(jnp.asarray(first[0]), None if first[1] is None else jnp.asarray(first[1]))
    states = []
    for number, cfg in enumerate(cfgs):
        given = {} if start is None else dict(start[number])
        threshold = given.pop("topk_threshold", 0.0)
        params = _checked(given, cfg) if given else initial_parameters(cfg, target)
        states.append(initial_state(params, cfg, options.optimizer)._replace(threshold=jnp.float32(threshold)))
    state, done, history = _stack(states, stacked), 0, {}
    if saved:
        state, preparation, done, history = load_run(Path(os.fspath(options.directory or "")), run, state)
    return jax.tree.map(jnp.array, state), preparation, done, history  # a step gives its memory away, so none is shared


def _checked(params: Any, cfg: TrainingConfig) -> dict[str, jax.Array]:
    expected = jax.eval_shape(lambda: initial_parameters(cfg))
    given = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    wrong = [
        f"{name} is {list(given[name].shape) if name in given else 'missing'}, expected "
        f"{list(expected[name].shape) if name in expected else 'no such parameter'}"
        for name in sorted(given.keys() | expected.keys())
        if name not in given or name not in expected or given[name].shape != expected[name].shape
    ]
    if wrong:
        raise InputError(f"The parameters to start from do not fit the config: {'; '.join(wrong)}.")
    return given


def _stack(trees: list[Any], stacked: bool) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if stacked else trees[0]


def _fetched(history: dict[str, np.ndarray], pending: list[Metrics], done: int) -> dict[str, np.ndarray]:
    """Returns the history with the steps since the last entry; their losses must be finite.

    Raises:
        TrainingError: a loss or a batch is not finite.
    """
    fetched = jax.device_get(pending)
    new = {name: np.stack([one[name] for one in fetched]) for name in fetched[0]}
    bad = new.pop("bad_inputs").reshape(len(fetched), -1).max(axis=1)
    loss = new["loss"].reshape(len(fetched), -1)
    wrong = (bad > 0) | ~np.isfinite(loss).all(axis=1)
    if wrong.any():
        at = int(np.argmax(wrong))
        step = done - len(fetched) + at
        if bad[at]:
            raise TrainingError(
                f"The batch of step {step} holds {int(bad[at])} NaN or infinite values. Leave those tokens out; a "
                "state saved before that step is still good."
            )
        raise TrainingError(
            f"The loss of step {step} is {loss[at].tolist()}. Lower lr, lengthen lr_warm_up_steps, or set clip; a "
            "state saved before that step is still good."
        )
    return {name: np.concatenate([history[name], values]) if history else values for name, values in new.items()}


def _result(
    state: TrainingState, history: dict[str, np.ndarray], cfg: TrainingConfig, preparation: Preparation,
    number: int | None,
) -> TrainingResult:  # fmt: skip
    own = state if number is None else jax.tree.map(lambda leaf: leaf[number], state)
    values = history if number is None else {name: array[:, number] for name, array in history.items()}
    dictionary: Dictionary | Crosscoder = finished(own, cfg, preparation)
    return TrainingResult(dictionary=dictionary, history=values, state=own, cfg=cfg, preparation=preparation)
