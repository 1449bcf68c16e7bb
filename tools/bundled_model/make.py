"""Trains the bundled model ``tljax-tiny``: ``python -m tools.bundled_model.make``."""

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

from tljax.checkpoints.files.hub import MODELS
from tljax.checkpoints.formats.native import save_native
from tljax.config import HookedTransformerConfig
from tljax.errors import TljaxError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.train.batches import Batch
from tljax.train.checkpoint import FILE
from tljax.train.trainer import TrainConfig, train
from tools.bundled_model import data, lexicon
from tools.bundled_model.evaluate import evaluate
from tools.bundled_model.repeats import repeating_rows
from tools.bundled_model.tokenizer import FIRST_WORD_ID, build_tokenizer, encode_rows

NAME = "tljax-tiny"
DIRECTORY = MODELS / NAME

MODEL: dict[str, Any] = {
    "n_layers": 4, "d_model": 64, "n_heads": 4, "d_mlp": 256, "n_ctx": 128, "act_fn": "gelu_new",
    "initializer_range": 0.08, "model_name": NAME,
}  # fmt: skip

STEPS = 4000
TEXT_POS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training: what its batches hold.

    Attributes:
        until: the fraction of all steps at which it ends.
        repeat_rows, repeat_pos: shape of a batch of repeating random words.
        text_rows: documents in a batch of text, which every even step takes; with 0 there is no text.
        answers_only: take only sentences with an answer, and count only the names that answer them.
    """

    until: float
    repeat_rows: int
    repeat_pos: int
    text_rows: int = 0
    answers_only: bool = False


STAGES = (
    Stage(until=0.25, repeat_rows=96, repeat_pos=20, text_rows=48, answers_only=True),
    Stage(until=0.45, repeat_rows=96, repeat_pos=20, text_rows=64),
    Stage(until=0.6, repeat_rows=40, repeat_pos=48, text_rows=64),
    Stage(until=1.0, repeat_rows=20, repeat_pos=128, text_rows=64),
)
"""Both circuits are found first, on what cannot be predicted without them: induction on short rows, where attention
that is still uniform gives the right token a twentieth rather than a hundredth; name moving on answers alone, because
in full text most of the loss is names and places that nobody can predict. English and long rows come last."""

ANSWER_WEIGHT = 4.0
"""How much a name that completes an indirect-object sentence counts in full text."""


def training_config(steps: int, seed: int, out: Path | None) -> TrainConfig:
    """How the bundled model is trained."""
    return TrainConfig(
        steps=steps, learning_rate=2e-3, warmup_steps=min(100, steps // 10), final_fraction=0.05, weight_decay=0.05,
        seed=seed, log_every=100, save_every=500, directory=out,
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
        if step % 2 or not stage.text_rows:
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
    one token, and copying a token, are short ways to go. What writes to the residual stream starts small, as in GPT-2.
    """
    cfg = HookedTransformerConfig(**MODEL, d_vocab=FIRST_WORD_ID + len(data.vocabulary()), seed=seed)
    params = HookedTransformer(cfg).params
    scales = {
        "W_E": 3.0, "W_Q": 1.5, "W_K": 1.5, "W_V": 1.5,
        "W_O": 1.5 / np.sqrt(2 * cfg.n_layers), "W_out": 1 / np.sqrt(2 * cfg.n_layers),
    }  # fmt: skip
    params = jax.tree_util.tree_map_with_path(lambda path, x: x * np.float32(scales.get(path[-1].key, 1)), params)
    angles = np.arange(cfg.n_ctx)[:, None] * np.geomspace(2.5, 0.05, cfg.d_model // 2)
    positions = 0.1 * np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    params["pos_embed"] = {"W_pos": jnp.asarray(positions, jnp.float32)}
    params["unembed"] = params["unembed"] | {"W_U": 0.2 * params["embed"]["W_E"].T}
    return HookedTransformer(cfg, params=params)


CARD = """\
# {name}

A GPT-2-like model of {n_layers} layers, {n_heads} heads, d_model {d_model}, MLPs of {d_mlp}, over a word-level
tokenizer, trained from scratch by this repository's own scripts on text of their own making (`tools/bundled_model`):

    {command}

It took {minutes:.1f} minutes on {cores} shared CPU cores ({cpu_minutes:.1f} minutes of CPU time).

| On data kept out of training | |
|---|---|
| indirect object is the likeliest word ({prompts} prompts, unseen combinations of people and place) | {accuracy:.2%} |
| mean logit difference, indirect object minus subject | {logit_difference:.2f} |
| swapping the giver's name flips the sign | {flipped:.2%} |
| best induction score, 20 random words said twice | {induction:.2f} |

`TRAINING.json` has the config, the loss, and every figure. Model, tokenizer and text: MIT License, as the code.
"""


def card(cfg: HookedTransformerConfig, log: dict[str, Any]) -> str:
    """The README beside the model."""
    results, spent = log["results"], log["time"]
    return CARD.format(
        **cfg.to_dict() | results["held_out"], name=NAME, command=log["command"], cores=spent["cores"],
        minutes=spent["wall_seconds"] / 60, cpu_minutes=spent["cpu_seconds"] / 60,
        induction=results["best_induction_score"]["20"],
    )  # fmt: skip


def save_bundled(directory: Path, model: HookedTransformer) -> HookedTransformer:
    """Writes the model in tljax's own format with its tokenizer, and returns what is read back."""
    directory.mkdir(parents=True, exist_ok=True)
    save_native(model.params, model.cfg, None, directory)
    build_tokenizer(data.vocabulary()).save(str(directory / "tokenizer.json"), pretty=False)
    return HookedTransformer.from_pretrained_no_processing(directory)


def run(steps: int, seed: int, directory: Path, work: Path | None = None) -> dict[str, Any]:
    """Trains, saves and evaluates; returns the log that is saved as ``TRAINING.json``.

    Args:
        steps: optimizer steps.
        seed: of the parameters and of the text.
        directory: where the model goes.
        work: where checkpoints go; an interrupted run goes on from there. ``None`` keeps none.
    """
    resumed = work is not None and (work / FILE).is_file()
    wall, cpu = time.perf_counter(), sum(os.times()[:2])
    config = training_config(steps, seed, work)
    result = train(initial_model(seed), Batches(steps, seed), config, resume=True)
    seconds = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": sum(os.times()[:2]) - cpu}
    log = {
        "command": f"python -m tools.bundled_model.make --steps {steps} --seed {seed}",
        "time": {name: round(value) for name, value in seconds.items()}
        | {"cores": os.cpu_count(), "only_since_resuming": resumed},
        "jax": jax.__version__,
        "config": {key: value for key, value in dataclasses.asdict(config).items() if key != "directory"},
        "history": [{key: round(value, 4) for key, value in entry.items()} for entry in result.history],
    }
    model = save_bundled(directory, result.model)
    log["results"] = evaluate(model)
    (directory / "TRAINING.json").write_text(json.dumps(log, indent=1) + "\n")
    (directory / "README.md").write_text(card(model.cfg, log))
    return log


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bundled_model.make", description=f"Trains {NAME}.")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and text (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the model goes (default: the one inside the package)")
    parser.add_argument("--work", type=Path, help="keep checkpoints here, and go on from the one found here")
    options = parser.parse_args(arguments)
    try:
        log = run(options.steps, options.seed, options.out or DIRECTORY, options.work)
    except TljaxError as error:
        parser.error(str(error))
    print(json.dumps(log["results"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
