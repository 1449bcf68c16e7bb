# ruff: noqa: PT028 (test_prompt is TransformerLens's name, and no test)
"""A first look at what a model predicts: ranks of an answer, a table of logits."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import typed, whole
from tljax.errors import InputError, TokenizerError

if TYPE_CHECKING:
    from tljax.model.hooked_transformer import HookedTransformer


@typed
def test_prompt(
    prompt: str,
    answer: str | list[str],
    model: "HookedTransformer",
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Prints how a model ranks the answer to a prompt, token by token; or several answers, by their first token.

    Args:
        prompt: the text before the answer.
        answer: the answer, of any number of tokens; or several, of which only the first token counts.
        model: a model with a tokenizer.
        prepend_space_to_answer: put a space before answers that start without one.
        print_details: also print tokens, logits, probabilities and the likeliest tokens.
        prepend_bos: whether the prompt gets BOS; ``None`` means the model's default.
        top_k: how many of the likeliest tokens to print.

    Raises:
        TokenizerError: the model has no tokenizer.
        InputError: no answer, or an empty one.
    """
    if model.tokenizer is None:
        raise TokenizerError("test_prompt needs text: attach a tokenizer with model = model.set_tokenizer(...).")
    texts = [answer] if isinstance(answer, str) else list(answer)
    if prepend_space_to_answer:
        texts = [text if text.startswith(" ") else f" {text}" for text in texts]
    if not texts or not all(text.strip() for text in texts):
        raise InputError(f"test_prompt needs an answer of one token or more; got {answer!r}.")
    several = len(texts) > 1
    start = np.asarray(model.to_tokens(prompt, prepend_bos=prepend_bos, truncate=False))[0]
    rows = [np.asarray(model.to_tokens(text, prepend_bos=False))[0] for text in texts]
    pieces = [model.to_str_tokens(text, prepend_bos=False) for text in texts]
    if print_details:
        print("Tokenized prompt:", model.to_str_tokens(prompt, prepend_bos=prepend_bos))
        print("Tokenized answers:" if several else "Tokenized answer:", pieces if several else pieces[0])
    steps = 1 if several else len(rows[0])
    logits = np.asarray(model(np.concatenate([start, rows[0][: steps - 1]])[None])[0, -steps:], np.float32)
    ranks = []
    for step, row in enumerate(logits):
        asked = [(str(piece[step]), int(tokens[step])) for piece, tokens in zip(pieces, rows, strict=True)]
        ranks.append([(piece, int((row > row[token]).sum())) for piece, token in asked])
        if print_details:
            _print_details(model, row, asked, ranks[-1], top_k)
    print(f"Ranks of the answer tokens: {ranks if several else [of[0] for of in ranks]}")


test_prompt.__test__ = False  # type: ignore[attr-defined]  # pytest must not take it for a test where it is imported


def _print_details(
    model: "HookedTransformer", row: np.ndarray, asked: list[tuple[str, int]], ranks: list[tuple[str, int]], top_k: int
) -> None:
    probabilities = np.asarray(jax.nn.softmax(row))
    print(f"Performance on answer token{'s' if len(asked) > 1 else ''}:")
    for (piece, token), (_, rank) in zip(asked, ranks, strict=True):
        print(f"Rank: {rank: <8} Logit: {row[token]:5.2f} Prob: {probabilities[token]:6.2%} Token: |{piece}|")
    for place, token in enumerate(np.argsort(-row, kind="stable")[:top_k]):
        text = model.to_string(int(token))
        print(f"Top {place}th token. Logit: {row[token]:5.2f} Prob: {probabilities[token]:6.2%} Token: |{text}|")


@typed
def logits_to_df(logits: Any, tokenizer: Any = None, top_k: int | None = None) -> Any:
    """Returns the logits of one position as a pandas table, likeliest first.

    Args:
        logits: ``[d_vocab]``.
        tokenizer: a Hugging Face tokenizer for the column ``token_string``; ``None`` leaves it out.
        top_k: how many rows; ``None`` means all.

    Returns:
        Columns ``token_index``, ``token_string``, ``logit``, ``log_prob``, ``probability``.

    Raises:
        InputError: logits of more than one position.
    """
    import pandas as pd

    if top_k is not None:
        whole(top_k, "top_k", at_least=1)
    row = jnp.asarray(logits).astype(jnp.float32)
    if row.ndim != 1:
        raise InputError(f"logits_to_df takes the logits of one position, [d_vocab]; got shape {row.shape}.")
    order = np.argsort(-np.asarray(row), kind="stable")[:top_k]
    log_probs = np.asarray(jax.nn.log_softmax(row))[order]
    columns: dict[str, Any] = {"token_index": order}
    if tokenizer is not None:
        columns["token_string"] = [tokenizer.decode([int(token)]) for token in order]
    columns |= {"logit": np.asarray(row)[order], "log_prob": log_probs, "probability": np.exp(log_probs)}
    return pd.DataFrame(columns)
