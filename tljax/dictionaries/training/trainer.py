"""``train_dictionary`` and ``train_dictionaries``: one dictionary, or a stack that shares each batch."""

import functools
from collections.abc import Sequence
from typing import Any, Unpack

from tljax import checks
from tljax.dictionaries.training.batches import batch_function, digest, pairs
from tljax.dictionaries.training.checkpoint import Run
from tljax.dictionaries.training.coefficients import check_stack, numbers_of, structure_of
from tljax.dictionaries.training.config import TrainingConfig
from tljax.dictionaries.training.devices import Devices
from tljax.dictionaries.training.loop import Loop, LoopOptions, TrainingResult, begin, run_steps, stack
from tljax.dictionaries.training.step import (
    Metrics,
    TrainingState,
    members_at_once,
    train_step,
    train_step_of_stack,
)
from tljax.errors import ConfigError

_typed = functools.partial(checks.typed, receiver=Loop)


@_typed
def train_dictionary(
    cfg: TrainingConfig,
    batches: Any,
    *,
    steps: int,
    batch_size: int = 4096,
    start: Any = None,
    mesh: Any = None,
    **options: Unpack[LoopOptions],
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
        start: a :class:`~tljax.dictionaries.Dictionary` to go on from, or parameters in units of training, with
            ``topk_threshold`` among them or not; ``None`` draws them. A ``jumprelu`` dictionary may go on as
            ``batchtopk``.
        mesh: a mesh of devices, of one process or several, over whose axes ``"data"`` and ``"fsdp"`` the tokens of each
            batch are spread; every device holds the whole dictionary. Every process gives the same batches.
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

    >>> import numpy as np
    >>> rows = np.random.default_rng(0).standard_normal((512, 8), np.float32)
    >>> cfg = TrainingConfig(architecture="batchtopk", d_in=8, d_sae=16, k=2, lr=1e-2)
    >>> result = train_dictionary(cfg, rows, steps=20, batch_size=64)
    >>> result.dictionary, bool(result.history["loss"][-1] < result.history["loss"][0])
    (Dictionary(jumprelu, 8 -> 16 -> 8), True)
    """
    given = None if start is None else [start]
    return _train([cfg], batches, steps, batch_size, given, Loop(**options), mesh, stacked=False)[0]


@_typed
def train_dictionaries(
    cfgs: Sequence[TrainingConfig],
    batches: Any,
    *,
    steps: int,
    batch_size: int = 4096,
    start: Any = None,
    mesh: Any = None,
    **options: Unpack[LoopOptions],
) -> tuple[TrainingResult, ...]:
    """Trains a stack of dictionaries on the same batches: a sweep of ``k``, of coefficients or of seeds.

    One compiled step trains all members on each batch, which is read, scaled and moved to the device once. Members may
    differ in every number of the config; they share what shapes the program: architecture, sizes, kinds of schedule.

    Args:
        cfgs: the settings of each member.
        batches: see :func:`train_dictionary`.
        steps: optimizer steps.
        batch_size: rows of a batch, where ``batches`` are rows in memory.
        start: what to start from, one for each member.
        **options: as for :func:`train_dictionary`; a log's metrics are each ``[member]``, and
            dictionaries are saved in ``directory/0``, ``directory/1``, ...

    Returns:
        A result for each member.

    Raises:
        ConfigError: the members cannot share a program; names the field.
        InputError, CheckpointError, TrainingError: see :func:`train_dictionary`.

    >>> import numpy as np
    >>> rows = np.random.default_rng(0).standard_normal((256, 8), np.float32)
    >>> cfgs = [TrainingConfig(architecture="topk", d_in=8, d_sae=16, k=k) for k in (1, 2, 4)]
    >>> results = train_dictionaries(cfgs, rows, steps=5, batch_size=64)
    >>> [float(result.history["l0"][-1]) <= k for result, k in zip(results, (1, 2, 4), strict=True)]
    [True, True, True]
    """
    if not cfgs:
        raise ConfigError("cfgs is empty: give the settings of at least one dictionary.")
    check_stack(cfgs)
    return _train(list(cfgs), batches, steps, batch_size, start, Loop(**options), mesh, stacked=True)


def _train(
    cfgs: list[TrainingConfig], batches: Any, steps: int, batch_size: int, start: Any, loop: Loop, mesh: Any, *,
    stacked: bool,
) -> tuple[TrainingResult, ...]:  # fmt: skip
    for name, value in {"steps": steps, "batch_size": batch_size}.items():
        checks.whole(value, name, at_least=1)
    source = batch_function(batches, batch_size, cfgs[0].seed)
    batch = pairs(source, cfgs[0])
    first = batch(0)
    structure = structure_of(cfgs[0], max((cfg.k for cfg in cfgs if cfg.k is not None), default=None))
    numbers = stack([numbers_of(cfg, steps) for cfg in cfgs], stacked)
    run = Run(cfgs, steps, batch_size, digest(first), loop.optimizer_name)
    devices = Devices.of(mesh)
    devices.check_first(first)
    begun = begin(cfgs, source, first, start, run, loop, stacked, devices)

    def one_step(state: TrainingState, number: int) -> tuple[TrainingState, Metrics]:
        x, y = devices.batch(batch(number))
        if not stacked:
            return train_step(state, x, y, numbers, begun.preparation, structure, loop.optimizer)
        at_once = members_at_once(len(cfgs))
        return train_step_of_stack(state, x, y, numbers, begun.preparation, structure, loop.optimizer, at_once)

    return run_steps(one_step, begun, run, loop, stacked, devices)
