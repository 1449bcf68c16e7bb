"""Training dictionaries."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from table import Case, World

from tljax.dictionaries import Tap
from tljax.dictionaries.training import TrainingConfig, dictionary_loss, initial_parameters, prepare, train_dictionaries
from tljax.dictionaries.training import train_dictionary as train
from tljax.dictionaries.training.checkpoint import FILE
from tljax.errors import ArgumentError, CheckpointError, ConfigError, InputError, TrainingError

ROWS = np.random.default_rng(0).standard_normal((64, 8), np.float32)


def _cfg(**fields: Any) -> TrainingConfig:
    return TrainingConfig(**({"d_in": 8, "d_sae": 16} | fields))


def _train(cfg: TrainingConfig | None = None, batches: Any = ROWS, **options: Any) -> Any:
    return train(_cfg() if cfg is None else cfg, batches, **({"steps": 3, "batch_size": 16} | options))


def _nan_at(step: int) -> Any:
    return lambda at: np.where(at == step, np.nan, 1).astype(np.float32) * ROWS[:16]


def _resumed(**changes: Any) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        _train(directory=directory, steps=2)
        return _train(directory=directory, resume=True, **changes)


def _cut_short(_: World) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        _train(directory=directory)
        path = Path(directory) / FILE
        path.write_bytes(path.read_bytes()[:-40])
        return _train(directory=directory, resume=True)


def _twice(_: World) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        _train(directory=directory)
        return _train(directory=directory)


TOPK, JUMPRELU = _cfg(architecture="topk", k=2), _cfg(architecture="jumprelu")

CASES: tuple[Case, ...] = (
    Case("an L0 target for topk", lambda w: _cfg(architecture="topk", k=2, l0_target=3), ConfigError, "l0_target=3",
         "topk", "jumprelu"),
    Case("an L1 coefficient for batchtopk", lambda w: _cfg(architecture="batchtopk", k=2, l1_coefficient=5.0),
         ConfigError, "l1_coefficient=5.0", "standard, gated"),
    Case("topk without k", lambda w: _cfg(architecture="topk"), ConfigError, "needs k"),
    Case("more features kept than there are", lambda w: _cfg(architecture="batchtopk", k=17), ConfigError, "k=17",
         "d_sae=16"),
    Case("Matryoshka widths that fall", lambda w: _cfg(architecture="batchtopk", k=2, matryoshka_widths=(8, 4)),
         ConfigError, "matryoshka_widths", "increasing"),
    Case("a misspelt architecture", lambda w: _cfg(architecture="jumprely"), ConfigError, "jumprely", "'jumprelu'"),
    Case("a NaN learning rate", lambda w: _cfg(lr=float("nan")), ConfigError, "lr"),
    Case("a negative learning rate", lambda w: _cfg(lr=-1e-3), ConfigError, "lr=-0.001", "positive"),
    Case("another output width without transcoder", lambda w: _cfg(d_out=4), ConfigError, "transcoder=True"),
    Case("a skip connection without transcoder", lambda w: _cfg(skip=True), ConfigError, "transcoder"),
    Case("a linear schedule with a decay", lambda w: _cfg(lr_schedule="linear", lr_decay_steps=5), ConfigError,
         "linear"),
    Case("a batch with NaN", lambda w: _train(batches=_nan_at(1)), TrainingError, "batch of step 1", "128 NaN"),
    Case("a first batch with NaN", lambda w: _train(batches=_nan_at(0)), TrainingError, "batch of step 0"),
    Case("NaN under a norm estimate",
         lambda w: _train(_cfg(normalize_activations="expected_average_only_in"), _nan_at(1)), InputError, "NaN"),
    Case("a learning rate that explodes", lambda w: _train(_cfg(lr=1e30)), TrainingError, "loss of step", "lr"),
    Case("activations of another width", lambda w: _train(batches=ROWS[:, :6]), InputError, "width 6", "d_in=8"),
    Case("token ids for activations", lambda w: _train(batches=np.zeros((64, 8), int)), InputError, "floating",
         "int64"),
    Case("a generator", lambda w: _train(batches=(ROWS for _ in range(9))), InputError, "generator", "step"),
    Case("fewer rows than a batch", lambda w: _train(batch_size=100), InputError, "batch_size=100", "64 rows"),
    Case("one array for a transcoder",
         lambda w: _train(_cfg(transcoder=True), lambda s: ROWS), InputError, "pair", "transcoder"),
    Case("unequal tokens for a transcoder", lambda w: _train(_cfg(transcoder=True), lambda s: (ROWS, ROWS[:9])),
         InputError, "encodes 64 tokens", "reconstructs 9"),
    Case("two sources for a crosscoder of three", lambda w: _train(_cfg(n_sources=3), lambda s: [ROWS, ROWS]),
         InputError, "2 sources", "n_sources=3"),
    Case("a reader of another point", lambda w: _train(
        _cfg(tap=Tap(reads="blocks.1.hook_resid_pre")), lambda s: {"blocks.1.hook_resid_post": ROWS}), InputError,
        "blocks.1.hook_resid_pre", "Did you mean"),
    Case("no steps", lambda w: _train(steps=0), InputError, "steps=0"),
    Case("a misspelt option", lambda w: _train(save_evry=3), ArgumentError, "save_evry", "save_every"),
    Case("parameters of another shape to start from",
         lambda w: _train(start=initial_parameters(_cfg(d_sae=8))), InputError, "W_enc is [8, 8]", "[8, 16]"),
    Case("an empty stack", lambda w: train_dictionaries([], ROWS, steps=1), ConfigError, "empty"),
    Case("a stack of two architectures", lambda w: train_dictionaries([_cfg(), JUMPRELU], ROWS, steps=1), ConfigError,
         "cfgs[1]", "architecture='jumprelu'"),
    Case("a stack of two widths", lambda w: train_dictionaries([_cfg(), _cfg(d_sae=32)], ROWS, steps=1), ConfigError,
         "d_sae=32"),
    Case("resumed with another learning rate", lambda w: _resumed(cfg=_cfg(lr=1.0)), CheckpointError, "lr: was 0.0003",
         "is 1.0"),
    Case("resumed with other activations", lambda w: _resumed(batches=ROWS + 1, steps=2), CheckpointError,
         "first batch"),
    Case("resumed for more steps", lambda w: _resumed(steps=5), CheckpointError, "steps: was 2, is 5"),
    Case("a state cut short", _cut_short, CheckpointError, "damaged", "Delete it"),
    Case("a directory that holds a state", _twice, ConfigError, "resume=True"),
    Case("a norm estimate of zeros", lambda w: prepare(
        _cfg(normalize_activations="expected_average_only_in"), lambda s: ROWS * 0), InputError, "only zeros"),
    Case("topk keeps at most k", lambda w: (dictionary_loss(
        initial_parameters(TOPK), ROWS, TOPK).features != 0).sum(axis=1).max() <= 2, equals=True),
    Case("an all-zero batch", lambda w: _train(
        _cfg(architecture="batchtopk", k=2), lambda s: ROWS * 0).history["loss"][-1], equals=0.0),
)  # fmt: skip
