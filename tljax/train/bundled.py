"""Trains the bundled model ``tljax-tiny``: ``python -m tljax.train.bundled``."""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checkpoints.native import save_native
from tljax.config import HookedTransformerConfig
from tljax.hooked_transformer import HookedTransformer
from tljax.train import data, lexicon
from tljax.train.batches import Batch
from tljax.train.evaluate import evaluate
from tljax.train.repeats import repeating_rows
from tljax.train.tokenizer import FIRST_WORD_ID, build_tokenizer, encode_rows
from tljax.train.trainer import TrainConfig, TrainResult, train

NAME = "tljax-tiny"
DIRECTORY = Path(__file__).parent.parent / "models" / NAME

MODEL: dict[str, Any] = {
    "n_layers": 3, "d_model": 64, "n_heads": 4, "d_mlp": 256, "n_ctx": 128, "act_fn": "gelu_new",
    "initializer_range": 0.12, "model_name": NAME,
}  # fmt: skip

STEPS = 3000
TEXT_POS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training: what the batches of its even and odd steps hold.

    Attributes:
        until: the fraction of all steps at which it ends.
        text_rows: documents in a batch of text (even steps).
        answers_only: take only sentences with an answer, and count only the names that answer them.
        repeat_rows, repeat_pos: shape of a batch of repeating random words (odd steps).
    """

    until: float
    text_rows: int
    answers_only: bool
    repeat_rows: int
    repeat_pos: int


STAGES = (
    Stage(until=0.35, text_rows=48, answers_only=True, repeat_rows=64, repeat_pos=20),
    Stage(until=0.6, text_rows=64, answers_only=False, repeat_rows=40, repeat_pos=48),
    Stage(until=1.0, text_rows=64, answers_only=False, repeat_rows=16, repeat_pos=128),
)
"""Both circuits are found first on what cannot be predicted without them. Answers alone, because in full text most of
the loss is names and places that nobody can predict; short rows of repeating words, because attention that is still
uniform then gives the right token a twentieth rather than a hundredth. English and long rows come after that."""

ANSWER_WEIGHT = 4.0
"""How much a name that completes an indirect-object sentence counts in full text."""


def training_config(steps: int, seed: int, out: Path | None) -> TrainConfig:
    """How the bundled model is trained."""
    return TrainConfig(
        steps=steps, learning_rate=2e-3, warmup_steps=min(100, steps // 10), final_fraction=0.05, weight_decay=0.05,
        seed=seed, log_every=100, save_every=500, out=out,
    )  # fmt: skip


class Batches:
    """The batch of each step: text on even steps, repeating random words on odd ones.

    Args:
        steps: length of the whole training, which sets the stages.
        seed: a batch is a function of the seed and its step.
    """

    def __init__(self, steps: int, seed: int) -> None:
        self._steps, self._seed = steps, seed
        self._tokenizer = build_tokenizer(data.vocabulary())
        self._names = self._ids(lexicon.NAMES)
        self._cues = self._ids(("to", *data.REACTIONS))

    def _ids(self, words: Iterable[str]) -> list[int]:
        return [self._tokenizer.encode(f" {word}").ids[0] for word in words]

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng([self._seed, step])
        stage = next(stage for stage in STAGES if step < stage.until * self._steps)
        if step % 2:
            return repeating_rows(rng, stage.repeat_rows, stage.repeat_pos, self._tokenizer.get_vocab_size())
        sentences = data.ANSWERED if stage.answers_only else data.SENTENCES
        texts = [data.document(rng, TEXT_POS - 2, sentences) for _ in range(stage.text_rows)]
        tokens, weights = encode_rows(self._tokenizer, texts, TEXT_POS)
        answers = np.isin(tokens[:, :-1], self._cues) & np.isin(tokens[:, 1:], self._names)
        if stage.answers_only:
            return tokens, answers.astype(np.float32)
        return tokens, weights * np.where(answers, np.float32(ANSWER_WEIGHT), np.float32(1))


def initial_model(seed: int) -> HookedTransformer:
    """A fresh model of the bundled shape, without tokenizer.

    Positions start as sinusoids, and the unembedding as a small copy of the embedding: from there looking back by
    one token, and copying a token, are short ways to go.
    """
    cfg = HookedTransformerConfig(**MODEL, d_vocab=FIRST_WORD_ID + len(data.vocabulary()), seed=seed)
    params = HookedTransformer(cfg).params
    angles = np.arange(cfg.n_ctx)[:, None] * np.geomspace(2.5, 0.05, cfg.d_model // 2)[None]
    positions = 0.1 * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    words = 2 * params["embed"]["W_E"]
    return HookedTransformer(
        cfg,
        params=params
        | {
            "embed": {"W_E": words},
            "pos_embed": {"W_pos": jnp.asarray(positions, jnp.float32)},
            "unembed": params["unembed"] | {"W_U": 0.2 * words.T},
        },
    )


def save_bundled(directory: Path, result: TrainResult, log: dict[str, Any]) -> None:
    """Writes the model in tljax's own format, its tokenizer, and the log of its training."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer(data.vocabulary()).save(str(directory / "tokenizer.json"), pretty=False)
    save_native(result.model.params, result.model.cfg, None, directory)
    (directory / "TRAINING.json").write_text(json.dumps(log, indent=1) + "\n")


def run(steps: int, seed: int, directory: Path, work: Path | None = None) -> dict[str, Any]:
    """Trains, saves and evaluates; returns the log that is saved as ``TRAINING.json``.

    Args:
        steps: optimizer steps.
        seed: of the parameters and of the text.
        directory: where the model goes.
        work: where checkpoints go; an interrupted run goes on from there. ``None`` keeps none.
    """
    wall, cpu = time.perf_counter(), sum(os.times()[:2])
    config = training_config(steps, seed, work)
    result = train(initial_model(seed), Batches(steps, seed), config, resume=True)
    seconds = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": sum(os.times()[:2]) - cpu}
    log = {
        "command": f"python -m tljax.train.bundled --steps {steps} --seed {seed}",
        "time": {name: round(value) for name, value in seconds.items()} | {"cores": os.cpu_count()},
        "jax": jax.__version__,
        "config": {key: value for key, value in dataclasses.asdict(config).items() if key != "out"},
        "history": [{key: round(value, 4) for key, value in entry.items()} for entry in result.history],
    }
    save_bundled(directory, result, log)
    log["results"] = evaluate(HookedTransformer.from_pretrained_no_processing(directory))
    save_bundled(directory, result, log)
    return log


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tljax.train.bundled", description=f"Trains {NAME}.")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and text (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the model goes (default: the one inside the package)")
    parser.add_argument("--work", type=Path, help="keep checkpoints here, and go on from the one found here")
    options = parser.parse_args(arguments)
    log = run(options.steps, options.seed, options.out or DIRECTORY, options.work)
    print(json.dumps(log["results"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
