"""Examples of a feature: windows of text around the tokens at which it is active."""

import dataclasses

import numpy as np

from tljax.dictionaries.pages.activations import FeatureActivations


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """A window of a prompt around a token at which a feature is active.

    Attributes:
        prompt: number of the prompt.
        pos: position of that token in the prompt.
        start: position of the window's first token.
        tokens: ids of the window, ``[n]``.
        activations: the feature's activation at each, ``[n]``.
        loss_changes: how much ablating the feature, everywhere in the prompt, raises the loss of the token after each,
            in nats, ``[n]``; NaN where no token follows. ``None`` if it was not measured.
    """

    prompt: int
    pos: int
    start: int
    tokens: np.ndarray
    activations: np.ndarray
    loss_changes: np.ndarray | None = None

    @property
    def peak(self) -> float:
        """The activation at ``pos``."""
        return float(self.activations[self.pos - self.start])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ExampleGroup:
    """Examples whose activations lie in one interval.

    Attributes:
        name: ``"largest"``, or the interval in words.
        low, high: ends of the interval.
        share: share of the feature's activations that lie in it.
        examples: the examples, largest first.
    """

    name: str
    low: float
    high: float
    share: float
    examples: tuple[Example, ...]


def choose_examples(
    activations: FeatureActivations,
    feature: int,
    *,
    k: int,
    n_intervals: int,
    per_interval: int,
    window: tuple[int, int],
    seed: int,
) -> tuple[ExampleGroup, ...]:
    """Chooses a feature's examples.

    The first group has the prompts with the largest activations, one token of each. The others divide the range from
    zero to the largest activation into equal intervals, from the highest to the lowest, and draw tokens from each at
    random, one of a prompt.

    Args:
        activations: where features are active.
        feature: the feature.
        k: examples of the first group.
        n_intervals: intervals.
        per_interval: examples of each.
        window: tokens shown before and after the one that is active.
        seed: where the draws start.
    """
    token, value = activations.of(feature)
    if not len(token):
        return ()
    dense = activations.dense(feature)
    sizes = np.abs(value)
    largest = float(sizes.max())

    def group(name: str, low: float, high: float, chosen: np.ndarray, share: float) -> ExampleGroup:
        ranked = chosen[np.argsort(-sizes[chosen], kind="stable")]
        made = tuple(_example(activations, dense, int(token[one]), window) for one in ranked)
        return ExampleGroup(name=name, low=low, high=high, share=share, examples=made)

    prompts = token // activations.tokens.shape[1]
    order = np.argsort(-sizes, kind="stable")
    top = order[np.sort(np.unique(prompts[order], return_index=True)[1])][:k]
    groups = [group("largest", float(sizes[top].min()), largest, top, len(top) / len(token))]
    generator = np.random.default_rng(seed)
    edges = np.linspace(0, largest, n_intervals + 1)
    for low, high in zip(edges[-2::-1], edges[:0:-1], strict=True):
        inside = np.flatnonzero((sizes > low) & (sizes <= high))
        drawn = generator.permutation(inside)
        one_each = drawn[np.sort(np.unique(prompts[drawn], return_index=True)[1])][:per_interval]
        share = len(inside) / len(token)
        groups.append(group(f"{low:.3g} to {high:.3g}", float(low), float(high), one_each, share))
    return tuple(groups)


def _example(activations: FeatureActivations, dense: np.ndarray, token: int, window: tuple[int, int]) -> Example:
    prompt, pos = divmod(token, activations.tokens.shape[1])
    length = int(activations.mask[prompt].sum())
    start, stop = max(0, pos - window[0]), min(length, pos + window[1] + 1)
    return Example(
        prompt=prompt,
        pos=pos,
        start=start,
        tokens=activations.tokens[prompt, start:stop],
        activations=dense[prompt, start:stop],
    )
