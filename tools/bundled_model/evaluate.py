"""What the bundled model has to show: held-out indirect objects, their corruptions, and induction."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tljax.analysis.induction import induction_scores
from tljax.model.hooked_transformer import HookedTransformer
from tools.bundled_model import lexicon
from tools.bundled_model.data import IOIPrompt, ioi_prompts
from tools.bundled_model.repeats import repeated_words
from tools.bundled_model.tokenizer import BOS_ID

REPEAT_LENGTHS = (10, 20, 40)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IOIScores:
    """How a model does on indirect-object prompts.

    Attributes:
        prompts: how many.
        accuracy: fraction whose most likely next token, of the whole vocabulary, is the answer.
        preference: fraction where the answer's logit is above the wrong name's.
        logit_difference: mean logit of the answer minus that of the wrong name.
        smallest_difference: its minimum.
        corrupted_difference: the mean after the corrupted prompts, where it should be as far below zero.
        flipped: fraction of prompts whose corruption changes the sign from plus to minus.
    """

    prompts: int
    accuracy: float
    preference: float
    logit_difference: float
    smallest_difference: float
    corrupted_difference: float
    flipped: float


def last_logits(model: HookedTransformer, texts: Sequence[str]) -> np.ndarray:
    """Logits after each text, ``[text, d_vocab]``; texts of different length are padded on the right."""
    tokens = np.asarray(model.to_tokens(list(texts), padding_side="right"))
    last = (tokens != BOS_ID).sum(axis=1)  # the leading BOS is at 0, padding has the same id
    logits = model(jnp.asarray(tokens))
    return np.asarray(logits[jnp.arange(len(texts)), jnp.asarray(last)])


def ioi_scores(model: HookedTransformer, prompts: Sequence[IOIPrompt]) -> IOIScores:
    """Scores a model on indirect-object prompts and on their corruptions."""
    rows = np.arange(len(prompts))
    clean = last_logits(model, [prompt.clean for prompt in prompts])
    corrupted = last_logits(model, [prompt.corrupted for prompt in prompts])
    answers = np.array([model.to_single_token(prompt.answer) for prompt in prompts])
    wrongs = np.array([model.to_single_token(prompt.wrong) for prompt in prompts])
    difference = clean[rows, answers] - clean[rows, wrongs]
    corrupted_difference = corrupted[rows, answers] - corrupted[rows, wrongs]
    return IOIScores(
        prompts=len(prompts),
        accuracy=float((clean.argmax(axis=1) == answers).mean()),
        preference=float((difference > 0).mean()),
        logit_difference=float(difference.mean()),
        smallest_difference=float(difference.min()),
        corrupted_difference=float(corrupted_difference.mean()),
        flipped=float(((difference > 0) & (corrupted_difference < 0)).mean()),
    )


def repeat_accuracy(model: HookedTransformer, length: int, n: int = 32, seed: int = 0) -> float:
    """Fraction of the tokens of a second copy of random words that the model predicts (the first token aside)."""
    rows = repeated_words(n, length, seed, model.cfg.d_vocab)
    guesses = np.asarray(model(jnp.asarray(rows)))[:, length + 1 : -1].argmax(axis=-1)
    return float((guesses == rows[:, length + 2 :]).mean())


def fact_accuracy(model: HookedTransformer) -> float:
    """Fraction of the landmarks and capitals that the model places in the right city."""
    facts = {f"{landmark} is in the city of": city for landmark, city in lexicon.LANDMARKS.items()}
    facts |= {f"The capital of {country} is": city for country, city in lexicon.CAPITALS.items()}
    guesses = last_logits(model, list(facts)).argmax(axis=1)
    return float(
        np.mean(
            [guess == model.to_single_token(f" {city}") for guess, city in zip(guesses, facts.values(), strict=True)]
        )
    )


def _fields(scores: IOIScores) -> dict[str, float]:
    return {name: round(value, 4) for name, value in dataclasses.asdict(scores).items()}


def _rounded(scores: jax.Array) -> list[list[float]]:
    return [[round(float(score), 3) for score in layer] for layer in scores]


def evaluate(model: HookedTransformer, n: int = 960, seed: int = 1) -> dict[str, object]:
    """Everything above, as plain values for the training log.

    Args:
        model: the bundled model, or one that shares its tokenizer.
        n: held-out prompts, and as many not held out.
        seed: of the prompts.

    Returns:
        ``held_out`` and ``not_held_out`` indirect-object scores; for each length of random words, their
        ``induction_scores [layer, head]`` and the accuracy on their second copy; the accuracy on facts.
    """
    scores = {
        length: induction_scores(model, length, tokens=repeated_words(32, length, seed, model.cfg.d_vocab))
        for length in REPEAT_LENGTHS
    }
    return {
        "held_out": _fields(ioi_scores(model, ioi_prompts(n, seed))),
        "not_held_out": _fields(ioi_scores(model, ioi_prompts(n, seed, held_out=False))),
        "induction_scores": {str(length): _rounded(s) for length, s in scores.items()},
        "best_induction_score": {str(length): round(float(s.max()), 3) for length, s in scores.items()},
        "repeat_accuracy": {str(length): round(repeat_accuracy(model, length), 4) for length in REPEAT_LENGTHS},
        "fact_accuracy": round(fact_accuracy(model), 4),
    }
