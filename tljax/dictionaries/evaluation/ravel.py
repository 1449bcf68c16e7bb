"""Cause and isolation of attributes by features (RAVEL, Huang et al. 2024), on prompts from local files."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tljax.checks import entry, typed, whole
from tljax.dictionaries.dictionary import Dictionary
from tljax.dictionaries.evaluation.running import Runs
from tljax.dictionaries.evaluation.sites import Sites
from tljax.errors import InputError
from tljax.hooks.interventions import Replace
from tljax.model.hooked_transformer import HookedTransformer
from tljax.tasks import Task
from tljax.text.batch import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RavelScores:
    """What exchanging features between entities does to what the model says of them.

    Attributes:
        cause: share of the prompts that ask for the attribute whose answer becomes the source's.
        isolate: share of the others whose answer stays the base's.
        disentangle: the mean of the two.
        unpatched: share of all prompts whose answer is the base's before anything is exchanged.
        moved: ``[prompt]``, whether the source's answer has the larger logit afterwards.
    """

    cause: float
    isolate: float
    disentangle: float
    unpatched: float
    moved: np.ndarray


@typed
def ravel_scores(
    model: HookedTransformer,
    dictionary: Dictionary,
    task: Task,
    features: Sequence[int] | np.ndarray,
    asks: Sequence[bool] | np.ndarray,
    *,
    part: str = "entity",
    batch_size: int = 8,
) -> RavelScores:
    """Puts the source's values of some features into the base, at the entity's last token, and scores the answers.

    All other features, and the dictionary's error, stay the base's.

    Args:
        model: the model that the dictionary belongs to.
        dictionary: a sparse autoencoder or transcoder.
        task: interchanges, from :func:`tljax.tasks.load_ravel`: ``clean`` is the base, ``corrupted`` the source.
        features: the features that are to carry the attribute.
        asks: for each prompt, whether it asks for that attribute: ``task.templates == number_of_its_split``.
        part: the labelled part whose last token is exchanged.
        batch_size: prompts in one run.

    Raises:
        InputError: a feature that does not exist, a part that a prompt lacks, or prompts of one kind alone.
    """
    whole(batch_size, "batch_size", at_least=1)
    sites, d_sae = Sites.of(dictionary, model), dictionary.cfg.d_sae
    wanted = np.asarray(asks)
    if wanted.shape != (len(task),) or wanted.dtype != bool or wanted.all() or not wanted.any():
        raise InputError(
            f"asks= must be {len(task)} booleans, True at the prompts that ask for the attribute, with prompts of both "
            f"kinds; got {wanted.dtype} {wanted.shape}, {int(wanted.sum())} true."
        )
    chosen = np.zeros(d_sae, bool)
    chosen[[entry(one, d_sae, "features", "features") for one in np.asarray(features, int).tolist()]] = True
    bases, sources = (_runs(batch, batch_size) for batch in (task.clean, task.corrupted))
    base_pos, source_pos = task.pos(part), task.pos(part, corrupted=True)
    moved, before = [], []
    for base, source in zip(bases, sources, strict=True):
        logits, cache = model.run_with_cache(base.batch, names_filter=sites.names)
        _, other = model.run_with_cache(source.batch, names_filter=sites.names, return_type=None)
        rows = np.resize(base.rows, len(base.batch))  # a batch that was filled up: what is added is dropped below
        written = _exchanged(
            dictionary, sites, {name: cache[name] for name in sites.names}, other[sites.reads[0]],
            jnp.asarray(base_pos[rows]), jnp.asarray(source_pos[rows]), jnp.asarray(chosen),
        )  # fmt: skip
        patched = model.run_with_hooks(base.batch, fwd_hooks=[(sites.writes[0], Replace(written))])
        before.append(_prefers_wrong(logits, base.batch, base.rows, task))
        moved.append(_prefers_wrong(patched, base.batch, base.rows, task))
    after = np.concatenate(moved)
    cause, isolate = float(after[wanted].mean()), float(1 - after[~wanted].mean())
    return RavelScores(
        cause=cause,
        isolate=isolate,
        disentangle=(cause + isolate) / 2,
        unpatched=float(1 - np.concatenate(before).mean()),
        moved=after,
    )


def _runs(batch: Batch, batch_size: int) -> Runs:
    """Returns prompts in batches padded right, so that a position in the text is one in the array."""
    rows = [np.asarray(batch.row(index)) for index in range(len(batch))]
    return Runs(Batch.from_rows(rows, "right"), batch_size, np.zeros(0, int))


@functools.partial(jax.jit, static_argnames="sites")
def _exchanged(
    dictionary: Dictionary,
    sites: Sites,
    values: Mapping[str, jax.Array],
    source: jax.Array,
    base_pos: Int[Array, " batch"],
    source_pos: Int[Array, " batch"],
    chosen: jax.Array,
) -> jax.Array:
    """Returns the value at the point written, with the chosen features' part at one position exchanged."""
    read = sites.part(values[sites.reads[0]], 0)
    own = dictionary.encode(read)
    other = dictionary.encode(sites.part(source, 0))
    rows = jnp.arange(own.shape[0])
    taken = other[rows, source_pos]
    mixed = own.at[rows, base_pos].set(jnp.where(chosen[None], taken, own[rows, base_pos]))
    change = dictionary.decode(mixed, read) - dictionary.decode(own, read)
    old = sites.part(values[sites.writes[0]], 0)
    return sites.put(values[sites.writes[0]], old + change.reshape(old.shape).astype(old.dtype), 0)


def _prefers_wrong(logits: Any, batch: Batch, rows: np.ndarray, task: Task) -> np.ndarray:
    """Returns for each prompt whether a wrong answer has a larger logit than every right one, at its last token."""
    last = np.asarray(batch.mask).sum(1) - 1
    final = np.asarray(logits, np.float32)[np.arange(len(last)), last][: len(rows)]
    best = [
        np.where(mask[rows], np.take_along_axis(final, ids[rows].astype(int), axis=1), -np.inf).max(1)
        for ids, mask in ((task.answers, task.answer_mask), (task.wrongs, task.wrong_mask))
    ]
    return best[1] > best[0]
