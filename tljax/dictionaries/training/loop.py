"""The loop of a training run: where it begins, its steps, its log, its saves, and what comes out."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax import checks
from tljax.dictionaries.crosscoder import Crosscoder
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.training.batches import Pair
from tljax.dictionaries.training.checkpoint import FILE, Run, load_run, save_run
from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.devices import ONE, Devices
from tljax.dictionaries.training.finish import finished
from tljax.dictionaries.training.initial import initial_parameters
from tljax.dictionaries.training.preparation import Preparation, prepare
from tljax.dictionaries.training.starting import starting_parameters
from tljax.dictionaries.training.step import Metrics, TrainingState, initial_state
from tljax.errors import ConfigError, DictionaryError, InputError, TrainingError
from tljax.processes import fetch

OnLog = Callable[[dict[str, Any]], None]


class LoopOptions(TypedDict, total=False):
    """Options of a training run, documented at :func:`~tljax.dictionaries.training.train_dictionary`."""

    preparation: Preparation | None
    optimizer: optax.GradientTransformation | None
    directory: str | os.PathLike[str] | None
    resume: bool
    save_every: int | None
    log_every: int
    on_log: OnLog | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """The options of a training run, checked; the fields are those of :class:`LoopOptions`."""

    preparation: Preparation | None = None
    optimizer: optax.GradientTransformation | None = None
    directory: str | os.PathLike[str] | None = None
    resume: bool = False
    save_every: int | None = None
    log_every: int = 100
    on_log: OnLog | None = None

    def __post_init__(self) -> None:
        for name in ("save_every", "log_every"):
            if getattr(self, name) is not None:
                checks.whole(getattr(self, name), name, at_least=1)

    @property
    def path(self) -> Path:
        """The directory of the state; only of runs that save it."""
        return Path(os.fspath(self.directory or ""))

    @property
    def optimizer_name(self) -> str:
        """What a saved state says of the optimizer."""
        return "adam" if self.optimizer is None else "given"

    def is_due(self, done: int, steps: int) -> tuple[bool, bool]:
        """Returns whether to log and whether to save after ``done`` of ``steps`` steps."""
        last = done == steps
        saves = self.directory is not None and (last or bool(self.save_every and done % self.save_every == 0))
        return last or saves or done % self.log_every == 0, saves


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


class Begun(NamedTuple):
    """A run before its next step.

    Attributes:
        state: the state; of several dictionaries a stack.
        preparation: what is done to activations.
        done: steps already done.
        history: what they measured.
    """

    state: TrainingState
    preparation: Preparation
    done: int
    history: dict[str, np.ndarray]


def begin(
    cfgs: list[TrainingConfig], source: Callable[[int], Any], first: Pair, start: Any, run: Run, loop: Loop,
    stacked: bool, devices: Devices = ONE,
) -> Begun:  # fmt: skip
    """Returns a run at its start, or where the saved one stopped.

    Args:
        cfgs: the settings of each member.
        source: activations as a function of the step, for :func:`prepare`.
        first: the activations of the first batch.
        start: what each member starts from; ``None`` draws it.
        run: what a saved run must agree in.
        loop: the options.
        stacked: whether the members are a stack.
        devices: where the state goes.

    Raises:
        ConfigError: a state is there and ``resume`` is off.
        InputError: ``start`` does not fit.
        CheckpointError: the state is damaged or of another run.
    """
    saved = loop.directory is not None and (loop.path / FILE).is_file()
    if saved and not loop.resume:
        raise ConfigError(
            f"{loop.directory} already holds a state of training. Pass resume=True to go on from it, or another "
            "directory."
        )
    if start is not None and len(start) != len(cfgs):
        raise InputError(f"start has parameters of {len(start)} dictionaries for {len(cfgs)} configs.")
    preparation = loop.preparation
    if preparation is None:
        preparation = Preparation() if saved else prepare(cfgs[0], source)
    _, target = preparation.apply(jnp.asarray(first[0]), None if first[1] is None else jnp.asarray(first[1]))
    states = []
    for number, cfg in enumerate(cfgs):
        params, threshold = starting_parameters(None if start is None else start[number], cfg)
        params = params or initial_parameters(cfg, target)
        states.append(initial_state(params, cfg, loop.optimizer)._replace(threshold=jnp.float32(threshold)))
    state, done, history = stack(states, stacked), 0, {}
    if saved:
        state, preparation, done, history = load_run(loop.path, run, state)
    state = jax.tree.map(jnp.array, state)  # a step gives its memory away, so none is shared
    return Begun(devices.state(state), preparation, done, history)


def run_steps(
    one_step: Callable[[TrainingState, int], tuple[TrainingState, Metrics]], begun: Begun, run: Run, loop: Loop,
    stacked: bool = False, devices: Devices = ONE,
) -> tuple[TrainingResult, ...]:  # fmt: skip
    """Does the steps that are left, logs and saves; returns a result for each member.

    Args:
        one_step: function of the state and the step's number that returns the state after it and what it measured.
        begun: the run before them.
        run: what the run is.
        loop: the options.
        stacked: whether the members are a stack.
        devices: where the state is; the first of their processes saves it.

    Raises:
        TrainingError: a loss or a batch is not finite.
    """
    state, preparation, done, history = begun
    pending: list[Metrics] = []
    while done < run.steps:
        state, metrics = one_step(state, done)
        pending.append(metrics)
        done += 1
        logs, saves = loop.is_due(done, run.steps)
        if not logs:
            continue
        history = _fetched(history, pending, done)
        pending.clear()
        if loop.on_log is not None:
            loop.on_log({"step": done, **{name: values[-1] for name, values in history.items()}})
        if saves:
            here = devices.on_host(state)
            with devices.saving() as writes:
                if writes:
                    save_run(loop.path, run, here, preparation, done, history)
                    results = _results(Begun(here, preparation, done, history), run, stacked)
                    _save_dictionaries(results, loop.path, stacked)
    return _results(Begun(devices.on_host(state), preparation, done, history), run, stacked)


def _save_dictionaries(results: Sequence[TrainingResult], directory: Path, stacked: bool) -> None:
    """Writes the dictionaries of a checkpoint beside its state, each in a folder of its own if there are several."""
    for number, result in enumerate(results):
        if isinstance(result.dictionary, Dictionary):
            with contextlib.suppress(DictionaryError):  # SAELens has no such dictionary
                result.dictionary.save(directory / (str(number) if stacked else ""))


def stack(trees: list[Any], stacked: bool) -> Any:
    """Returns trees of arrays as one with a leading axis of members, or the only one as it is."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if stacked else trees[0]


def _fetched(history: dict[str, np.ndarray], pending: list[Metrics], done: int) -> dict[str, np.ndarray]:
    """Returns the history with the steps since the last entry; their losses must be finite.

    Raises:
        TrainingError: a loss or a batch is not finite.
    """
    fetched = fetch(pending)
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


def _results(ended: Begun, run: Run, stacked: bool) -> tuple[TrainingResult, ...]:
    return tuple(_result(ended, cfg, number if stacked else None) for number, cfg in enumerate(run.cfgs))


def _result(ended: Begun, cfg: TrainingConfig, number: int | None) -> TrainingResult:
    state, preparation, _, history = ended
    own = state if number is None else jax.tree.map(lambda leaf: leaf[number], state)
    values = history if number is None else {name: array[:, number] for name, array in history.items()}
    dictionary: Dictionary | Crosscoder = finished(own, cfg, preparation)
    return TrainingResult(dictionary=dictionary, history=values, state=own, cfg=cfg, preparation=preparation)
