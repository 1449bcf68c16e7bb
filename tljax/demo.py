"""The demo behind ``python -m tljax``: activation patching on a pair of prompts, and a report of the findings."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax.analysis.induction import heads_above, induction_scores
from tljax.cache.activation_cache import ActivationCache
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.patching.metrics.metrics import LogitDiff
from tljax.patching.result import PatchingResult
from tljax.patching.sweep import sweep
from tljax.viz import heatmap, text_heatmap

CLEAN = "When John and Mary went to the store, John gave a drink to"
CORRUPTED = "When John and Mary went to the store, Mary gave a drink to"
ANSWER, WRONG = " Mary", " John"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """Results of the demo.

    Attributes:
        model: one line about the model.
        clean, corrupted: the prompts.
        answer, wrong: the two tokens compared.
        clean_tokens, corrupted_tokens: the prompts token by token.
        clean_difference, corrupted_difference: logit of answer minus logit of wrong after each prompt.
        clean_top, corrupted_top: most likely next tokens with their probabilities.
        residual: normalised effect of patching the residual stream, ``[layer, pos]`` (0 corrupted, 1 clean).
        heads: normalised effect of patching each head's output at all positions, ``[layer, head]``.
        attention: for each hot head, ``(layer, head, effect, attended position, attention)`` from the last position.
        induction: ``(layer, head, score)`` of the induction heads.
    """

    model: str
    clean: str
    corrupted: str
    answer: str
    wrong: str
    clean_tokens: list[str]
    corrupted_tokens: list[str]
    clean_difference: float
    corrupted_difference: float
    clean_top: list[tuple[str, float]]
    corrupted_top: list[tuple[str, float]]
    residual: np.ndarray
    heads: np.ndarray
    attention: list[tuple[int, int, float, int, float]]
    induction: list[tuple[int, int, float]]

    def to_json(self) -> dict[str, Any]:
        """Returns the findings as plain values."""
        fields = dataclasses.asdict(self)
        return fields | {"residual": self.residual.tolist(), "heads": self.heads.tolist()}


def investigate(model: HookedTransformer, clean: str, corrupted: str, answer: str, wrong: str) -> Findings:
    """Runs both prompts, both sweeps and the search for induction heads.

    Raises:
        TokenizerError: ``answer`` or ``wrong`` is not a single token.
        InputError: the prompts differ in length, or do not change the metric.
    """
    metric = LogitDiff(model.to_single_token(answer), model.to_single_token(wrong))
    clean_ids, corrupted_ids = _same_length(model, clean, corrupted)
    wanted = ("hook_resid_pre", "hook_z", "hook_pattern")
    clean_logits, cache = model.run_with_cache(clean_ids, names_filter=lambda name: name.endswith(wanted))
    corrupted_logits = model(corrupted_ids)
    clean_difference = float(metric(clean_logits)[0])
    corrupted_difference = float(metric(corrupted_logits)[0])
    if abs(clean_difference - corrupted_difference) < 1e-3:
        raise InputError(
            f"The model prefers {answer!r} to {wrong!r} by {clean_difference:.3f} after both prompts: there is nothing "
            "to trace. Choose a corrupted prompt that changes the answer."
        )
    residual = sweep(model, corrupted_ids, cache, metric, "resid_pre", ("pos",))
    heads = sweep(model, corrupted_ids, cache, metric, "z", ("head",))
    return Findings(
        model=repr(model),
        clean=clean, corrupted=corrupted, answer=answer, wrong=wrong,
        clean_tokens=_str_tokens(model, clean), corrupted_tokens=_str_tokens(model, corrupted),
        clean_difference=clean_difference, corrupted_difference=corrupted_difference,
        clean_top=_top_tokens(model, clean_logits), corrupted_top=_top_tokens(model, corrupted_logits),
        residual=np.asarray(residual.normalized(clean_difference)),
        heads=np.asarray(heads.normalized(clean_difference)),
        attention=_attention_of_top_heads(cache, heads, clean_difference),
        induction=_induction_heads(model),
    )  # fmt: skip


def _str_tokens(model: HookedTransformer, text: str) -> list[str]:
    return [str(token) for token in model.to_str_tokens(text)]


def _same_length(model: HookedTransformer, clean: str, corrupted: str) -> tuple[jax.Array, jax.Array]:
    pair = model.to_tokens(clean, truncate=False), model.to_tokens(corrupted, truncate=False)
    if pair[0].shape != pair[1].shape:
        raise InputError(
            "Patching compares the prompts position by position, so both must have the same number of tokens. Clean "
            f"has {pair[0].shape[1]}: {_str_tokens(model, clean)}. Corrupted has {pair[1].shape[1]}: "
            f"{_str_tokens(model, corrupted)}. Swap words for others of as many tokens."
        )
    return pair


def _top_tokens(model: HookedTransformer, logits: jax.Array, count: int = 3) -> list[tuple[str, float]]:
    probabilities = jax.nn.softmax(logits[0, -1].astype(jnp.float32))
    values, ids = jax.lax.top_k(probabilities, count)
    return [(model.to_single_str_token(int(token)), float(value)) for value, token in zip(values, ids, strict=True)]


def _attention_of_top_heads(
    cache: ActivationCache, heads: PatchingResult, clean: float
) -> list[tuple[int, int, float, int, float]]:
    effects = np.asarray(heads.normalized(clean))
    order = np.argsort(-np.abs(effects).ravel())[:4]
    found = []
    for layer, head in (np.unravel_index(n, effects.shape) for n in order):
        if abs(effects[layer, head]) < 0.05:
            continue
        row = np.asarray(cache["pattern", int(layer)][0, head, -1], np.float32)
        key = int(row.argmax())
        found.append((int(layer), int(head), float(effects[layer, head]), key, float(row[key])))
    return found


def _induction_heads(model: HookedTransformer) -> list[tuple[int, int, float]]:
    length = min(20, (model.cfg.n_ctx - 1) // 2)
    return heads_above(induction_scores(model, length=length, batch_size=8))[:5]


def residual_story(findings: Findings) -> list[str]:
    """Returns one sentence for each run of layers: at which position the answer's information is."""
    peaks = findings.residual.argmax(axis=1)
    sentences, start = [], 0
    for layer in range(1, len(peaks) + 1):
        if layer < len(peaks) and peaks[layer] == peaks[start]:
            continue
        pos = int(peaks[start])
        span = f"layer {start}" if layer - start == 1 else f"layers {start} to {layer - 1}"
        best = float(findings.residual[start:layer, pos].max())
        sentences.append(
            f"Entering {span}, what decides the answer sits at position {pos} ({findings.clean_tokens[pos]!r}): "
            f"patching it there restores {best:.0%} of the clean logit difference."
        )
        start = layer
    return sentences


def head_story(findings: Findings) -> list[str]:
    """Returns one sentence for each head that carries the answer."""
    tokens = findings.clean_tokens
    return [
        f"L{layer}H{head} {'carries' if effect > 0 else 'works against'} {abs(effect):.0%} of it; from the last token "
        f"({tokens[-1]!r}) it looks mostly at position {key} ({tokens[key]!r}, {attention:.0%})."
        for layer, head, effect, key, attention in findings.attention
    ] or ["No single head moves the answer by more than 5%."]


def induction_story(findings: Findings) -> str:
    """Returns a sentence that lists the induction heads."""
    if not findings.induction:
        return "No head attends to what followed an earlier copy of the token (no score above 0.3)."
    heads = ", ".join(f"L{layer}H{head} ({score:.2f})" for layer, head, score in findings.induction)
    return f"Induction heads, by their attention to what followed the token's earlier copy: {heads}."


def position_labels(findings: Findings) -> list[str]:
    """Returns one label per position: the token, or both tokens where the prompts differ."""
    pairs = zip(findings.clean_tokens, findings.corrupted_tokens, strict=True)
    return [clean if clean == corrupted else f"{clean}/{corrupted.strip()}" for clean, corrupted in pairs]


def _layer_labels(findings: Findings) -> list[str]:
    return [f"L{layer}" for layer in range(len(findings.residual))]


def report(findings: Findings) -> Iterator[str]:
    """Yields the findings as lines of text."""
    yield findings.model
    yield ""
    for name in ("clean", "corrupted"):
        top = ", ".join(f"{token!r} {p:.0%}" for token, p in getattr(findings, f"{name}_top"))
        yield f"{name.capitalize():<10} {getattr(findings, name)!r}"
        yield f"{'':<10} next: {top}"
        difference = getattr(findings, f"{name}_difference")
        yield f"{'':<10} logit({findings.answer!r}) - logit({findings.wrong!r}) = {difference:+.2f}"
    yield ""
    yield "Each number below: put one clean activation into the corrupted run. 0 = still corrupted, 1 = as clean."
    yield ""
    yield "Residual stream entering each layer, by position"
    labels = [f"{n} {token.strip() or repr(token)}" for n, token in enumerate(findings.clean_tokens)]
    yield text_heatmap(findings.residual.T, _layer_labels(findings), labels)
    yield from residual_story(findings)
    yield ""
    yield "Output of each head, all positions"
    yield text_heatmap(findings.heads, [f"H{head}" for head in range(findings.heads.shape[1])], _layer_labels(findings))
    yield from head_story(findings)
    yield ""
    yield induction_story(findings)


def save_pictures(findings: Findings, directory: Path) -> list[Path]:
    """Saves both heat maps as PNG and returns their paths."""
    restored = "0 = corrupted, 1 = clean"
    residual_path, heads_path = directory / "residual_patching.png", directory / "head_patching.png"
    heatmap(
        findings.residual, x_labels=position_labels(findings), y_labels=_layer_labels(findings),
        title="Patching the residual stream", x_title="position", y_title="entering layer", colour_title=restored,
        path=residual_path,
    )  # fmt: skip
    heatmap(
        findings.heads, y_labels=_layer_labels(findings), title="Patching each head's output", x_title="head",
        y_title="layer", colour_title=restored, path=heads_path,
    )  # fmt: skip
    return [residual_path, heads_path]
