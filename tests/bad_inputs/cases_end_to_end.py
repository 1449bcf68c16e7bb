"""Training dictionaries end to end."""

from typing import Any

import numpy as np
from table import Case, World

import tljax
from tljax.dictionaries import Dictionary, Tap
from tljax.dictionaries.training import TrainingConfig, train_dictionary, train_dictionary_end_to_end
from tljax.errors import ArgumentError, ConfigError, DictionaryError, InputError, TrainingError, UnknownHookError

POINT = "blocks.2.hook_resid_pre"
TOKENS = np.arange(1, 13).reshape(3, 4)


def _cfg(**fields: Any) -> TrainingConfig:
    return TrainingConfig(**({"d_in": 64, "d_sae": 8, "tap": Tap(reads=POINT)} | fields))


def _train(
    w: World, cfg: TrainingConfig | None = None, prompts: Any = TOKENS, model: Any = None, **options: Any
) -> Any:
    given = {"steps": 1, "batch_size": 2} | options
    return train_dictionary_end_to_end(model or w.tiny, cfg or _cfg(), prompts, **given)


def _dictionary(**fields: Any) -> Dictionary:
    rows = np.ones((2, 64), np.float32)
    return train_dictionary(_cfg(**fields), rows, steps=1, batch_size=2).dictionary


CASES: tuple[Case, ...] = (
    Case("end to end without a tap", lambda w: _train(w, _cfg(tap=Tap())), ConfigError, "tap=Tap(reads="),
    Case("end to end at a misspelt point", lambda w: _train(w, _cfg(tap=Tap(reads="blocks.2.hook_resid_pree"))),
         UnknownHookError, "hook_resid_pre"),
    Case("end to end at a point of another width", lambda w: _train(w, _cfg(d_in=32)), DictionaryError, "width 32",
         POINT),
    Case("a crosscoder end to end", lambda w: _train(w, _cfg(n_sources=2)), ConfigError, "crosscoder"),
    Case("matching pursuit end to end", lambda w: _train(w, _cfg(architecture="matching_pursuit")), ConfigError,
         "no encoder"),
    Case("a transcoder that writes nowhere", lambda w: _train(w, _cfg(transcoder=True)), ConfigError, "writes="),
    Case("a model with hooks end to end",
         lambda w: _train(w, model=w.tiny.with_hooks([(POINT, tljax.Scale(2.0))])), InputError, "reset_hooks"),
    Case("a spliced model end to end", lambda w: _train(w, model=w.tiny.with_dictionaries({POINT: _dictionary()})),
         InputError, "without_dictionaries", "start="),
    Case("an end without weight", lambda w: _train(w, kl_coefficient=0.0), ConfigError, "kl_coefficient=0",
         "train_dictionary"),
    Case("a negative weight of the divergence", lambda w: _train(w, kl_coefficient=-1.0), ConfigError,
         "kl_coefficient=-1.0"),
    Case("a balance with an error of no weight", lambda w: _train(w, kl_coefficient="balanced"), ConfigError,
         "mse_coefficient=1.0"),
    Case("a misspelt balance", lambda w: _train(w, kl_coefficient="balance"), InputError, "balanced"),
    Case("a layer before the dictionary", lambda w: _train(w, downstream_layers=[1, 3]), ConfigError, "[1, 3]",
         "layers 3 to 3"),
    Case("a later layer where there is none",
         lambda w: _train(w, _cfg(tap=Tap(reads="blocks.3.hook_resid_mid")), downstream_layers="all"), ConfigError,
         "are none"),
    Case("Matryoshka without an error", lambda w: _train(
        w, _cfg(architecture="batchtopk", k=2, matryoshka_widths=(4,))), ConfigError, "matryoshka_widths",
        "mse_coefficient=1.0"),
    Case("all tokens excluded", lambda w: _train(w, exclude_tokens=range(20)), InputError, "step 0", "excluded"),
    Case("fewer prompts than a batch", lambda w: _train(w, batch_size=9), InputError, "batch_size=9", "3 rows"),
    Case("a token of another vocabulary", lambda w: _train(w, prompts=TOKENS + 100_000), InputError, "vocabulary"),
    Case("no steps end to end", lambda w: _train(w, steps=0), InputError, "steps=0"),
    Case("a misspelt option end to end", lambda w: _train(w, kl_coeficient=2.0), ArgumentError, "kl_coefficient"),
    Case("a learning rate that explodes end to end", lambda w: _train(w, _cfg(lr=1e30), steps=3), TrainingError,
         "loss of step", "lr"),
    Case("a dictionary of another size to start from", lambda w: _train(w, _cfg(d_sae=16), start=_dictionary()),
         InputError, "d_sae is 8, not 16", "TrainingConfig.of"),
    Case("a dictionary of another architecture to start from",
         lambda w: _train(w, _cfg(architecture="topk", k=2), start=_dictionary()), InputError,
         "architecture is 'standard', not 'topk'"),
    Case("a dictionary of raw activations for scaled ones", lambda w: _train(
        w, _cfg(normalize_activations="expected_average_only_in", n_batches_for_norm_estimate=1), start=_dictionary()),
        InputError, 'normalize_activations="none"'),
    Case("a dictionary of another layer to start from",
         lambda w: _train(w, start=_dictionary(tap=Tap(reads="blocks.1.hook_resid_pre"))), InputError,
         "blocks.1.hook_resid_pre", POINT, "Tap(reads="),
    Case("a path to start from", lambda w: _train(w, start="sae"), InputError, "Dictionary", "str"),
)  # fmt: skip
