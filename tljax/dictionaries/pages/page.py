"""Pages of features: one feature, a dashboard of many, the features of a prompt."""

import functools
from collections.abc import Sequence
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np

from tljax import viz
from tljax.checks import typed, whole
from tljax.dictionaries.evaluation.sites import AnyDictionary, Sites
from tljax.dictionaries.pages.activations import FeatureActivations, collect_activations
from tljax.dictionaries.pages.effects import CONVENTION
from tljax.dictionaries.pages.examples import Example, ExampleGroup
from tljax.dictionaries.pages.summary import FeatureSummary, Histogram, SummaryOptions, summarise_features
from tljax.errors import InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.text.methods import token_labels
from tljax.viz import Html
from tljax.viz.html import render, running_token, spelt, token_label
from tljax.viz.scale import Scale

SORTS = (
    ("largest", "largest activation"),
    ("density", "density"),
    ("ablation", "effect of ablation"),
    ("decoder_norm", "decoder norm"),
    ("feature", "number"),
)
"""What a dashboard sorts by, with its words."""


_typed = functools.partial(typed, receiver=summarise_features)
"""Checks options that :func:`summarise_features` receives, and shows their defaults."""


@_typed
def feature_page(
    model: HookedTransformer,
    dictionary: AnyDictionary,
    prompts: Any,
    feature: int,
    *,
    title: str | None = None,
    **options: Unpack[SummaryOptions],
) -> Html:
    """Shows a feature: densities, activations, effects on the logits, similar features, examples in context.

    Args:
        model: the model that the dictionary belongs to.
        dictionary: the dictionary.
        prompts: texts, token ids, a ``Batch``, or what :func:`collect_activations` returned.
        feature: its number.
        title: a heading; by default the dictionary in words.
        **options: as for :func:`summarise_features`.

    Returns:
        A page that needs no network; it shows itself in a notebook, and ``.save(path)`` writes it.

    Raises:
        InputError: no such feature; otherwise as :func:`summarise_features`.
    """
    return feature_dashboard(model, dictionary, prompts, [feature], title=title, **options)


@_typed
def feature_dashboard(
    model: HookedTransformer,
    dictionary: AnyDictionary,
    prompts: Any,
    features: Sequence[int] | None = None,
    *,
    title: str | None = None,
    **options: Unpack[SummaryOptions],
) -> Html:
    """Shows many features, with a list that can be searched and sorted.

    Args:
        model, dictionary, prompts, title, **options: as for :func:`feature_page`.
        features: which; ``None`` takes the 100 whose largest activation times decoder norm is largest.

    Raises:
        InputError: a feature that does not exist; otherwise as :func:`summarise_features`.
    """
    read = ("batch_size", "exclude_tokens", "prepend_bos", "progress")
    collected = prompts
    if not isinstance(prompts, FeatureActivations):
        collecting: Any = {name: value for name, value in options.items() if name in read}
        collected = collect_activations(model, dictionary, prompts, **collecting)
    summaries = summarise_features(model, dictionary, collected, features, **options)
    return draw_features(model, dictionary, collected, summaries, title=title)


@typed
def draw_features(
    model: HookedTransformer,
    dictionary: AnyDictionary,
    collected: FeatureActivations,
    summaries: Sequence[FeatureSummary],
    *,
    title: str | None = None,
) -> Html:
    """Draws summaries of features as a page: :func:`feature_dashboard` for data made before.

    Args:
        model, dictionary: the model and the dictionary.
        collected: what the summaries were made of.
        summaries: the features, at least one.
        title: a heading; by default the dictionary in words.
    """
    if not summaries:
        raise InputError("There are no summaries to draw: give at least one feature.")
    sites = Sites.of(dictionary, model)
    alive = collected.density[collected.density > 0]
    reads, writes = ", ".join(sites.reads), ", ".join(sites.writes)
    place = reads if reads == writes else f"{reads} to {writes}"
    data = {
        "note": f"{place}; {collected.n_tokens} tokens of {len(collected.tokens)} prompts",
        "convention": CONVENTION,
        "d_sae": collected.d_sae,
        "dead": int((collected.fired == 0).sum()),
        "densities": _histogram(Histogram.of(np.log10(alive), 40)),
        "palette": Scale(0.0, 1.0).palette(),
        "sorts": SORTS,
        "features": [_card(model, summary) for summary in summaries],
    }
    return render("features.html.jinja", title=title or repr(dictionary), kind="features", data=data)


@typed
def feature_activations(
    model: HookedTransformer,
    dictionary: AnyDictionary,
    prompt: Any,
    *,
    k: int = 10,
    names: Sequence[str] | None = None,
    prepend_bos: bool | None = None,
    title: str | None = None,
) -> Html:
    """Shows which features are active on a prompt.

    Args:
        model: the model that the dictionary belongs to.
        dictionary: the dictionary.
        prompt: one text, or token ids ``[pos]`` or ``[1, pos]``.
        k: features listed for a token.
        names: a name for each feature of the dictionary, such as explanations of them.
        prepend_bos: whether a text gets a BOS token; ``None`` means ``cfg.default_prepend_bos``.
        title: a heading; by default the dictionary in words.

    Raises:
        InputError: more than one prompt, or as many names as there are features are not given.
        DictionaryError: the dictionary does not fit the model.
    """
    whole(k, "k", at_least=1)
    collected = collect_activations(model, dictionary, prompt, prepend_bos=prepend_bos, progress=False)
    if len(collected.tokens) != 1:
        raise InputError(f"There are {len(collected.tokens)} prompts; the picture shows one: give prompts[0].")
    if names is not None and len(names) != collected.d_sae:
        raise InputError(f"names has {len(names)} entries; give one for each of the {collected.d_sae} features.")
    active = np.flatnonzero(collected.fired).tolist()
    ids = collected.tokens[0][collected.mask[0]]
    columns = [collected.dense(one)[0][collected.mask[0]] for one in active]
    table = np.stack(columns, 1) if columns else np.zeros((len(ids), 1), np.float32)
    labels = [f"feature {one}" if names is None else f"{one} {names[one]}" for one in active] or ["feature 0"]
    return viz.feature_activations(
        token_labels(model, ids), jnp.asarray(table), names=labels, k=k, title=title or repr(dictionary)
    )


def _card(model: HookedTransformer, summary: FeatureSummary) -> dict[str, Any]:
    """Returns what the page's script draws of a feature."""
    promoted, suppressed = (
        [[token_label(token), _short(effect)] for token, effect in pairs]
        for pairs in (summary.promoted, summary.suppressed)
    )
    groups = [_group(model, group, number == 0) for number, group in enumerate(summary.groups) if group.examples]
    peaks = list(dict.fromkeys(one["tokens"][one["peak"]] for one in groups[0]["examples"])) if groups else []
    texts = ["".join(one["text"]) for group in groups for one in group["examples"]]
    words = [token for token, _ in promoted]
    return {
        "feature": summary.feature,
        "n_tokens": summary.n_tokens,
        "density": _short(summary.density),
        "largest": _short(summary.largest),
        "mean": _short(summary.mean),
        "top": _short(max((group.high for group in summary.groups), default=1.0)),
        "decoder_norm": _short(summary.decoder_norm),
        "cosine": _short(summary.encoder_decoder_cosine),
        "ablation": _short(summary.ablation),
        "activations": _histogram(summary.activations),
        "logits": None if summary.logits is None else _histogram(summary.logits),
        "promoted": promoted,
        "suppressed": suppressed,
        "similar": [[feature, _short(value)] for feature, value in summary.similar],
        "correlated": [[feature, _short(value)] for feature, value in summary.correlated],
        "groups": groups,
        "label": " ".join(peaks[:4]) or "never active",
        "search": "\n".join([*words, *peaks, *dict.fromkeys(texts)]).lower(),
    }


def _group(model: HookedTransformer, group: ExampleGroup, is_top: bool) -> dict[str, Any]:
    examples = [_example(model, one) for one in group.examples]
    return {"name": spelt(group.name), "is_top": is_top, "share": _short(group.share), "examples": examples}


def _example(model: HookedTransformer, one: Example) -> dict[str, Any]:
    labels = token_labels(model, one.tokens)
    losses = None if one.loss_changes is None else [_short(change) for change in one.loss_changes]
    return {
        "prompt": one.prompt,
        "start": one.start,
        "peak": one.pos - one.start,
        "tokens": [token_label(label) for label in labels],
        "text": [running_token(label).replace("\n", "") for label in labels],
        "values": [_short(value) for value in one.activations],
        "losses": losses,
    }


def _histogram(histogram: Histogram) -> dict[str, list[float]]:
    return {"counts": histogram.counts.tolist(), "edges": [float(f"{edge:.4g}") for edge in histogram.edges]}


def _short(value: float) -> float | None:
    """Returns a number to four digits, as JSON can hold it: ``None`` for one that is unknown."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
