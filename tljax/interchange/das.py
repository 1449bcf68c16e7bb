"""``fit_das``, by TransformerLens's name and arguments, and the evaluation of a given basis at one point."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tljax.checks import typed, whole
from tljax.errors import InputError
from tljax.hooks.interchanges import Interchange, orthonormal
from tljax.hooks.names import ActName
from tljax.interchange.controls import CONTROLS, Control
from tljax.interchange.grid import train_interchange
from tljax.interchange.pairs import InterchangePairs
from tljax.interchange.programs import Subspace
from tljax.interchange.result import InterchangeResult
from tljax.interchange.scoring import Scores
from tljax.interchange.settings import Settings
from tljax.interchange.sites import point_at
from tljax.model.hooked_transformer import HookedTransformer

_SITE = "site"
_AT_ONCE = 32
"""Most pairs that run at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DASResult:
    """A trained subspace at one point.

    Attributes:
        subspace: orthonormal columns ``[d, rank]``.
        losses: mean loss of each epoch, in nats.
        hook_name: the point's full name.
        rank: number of dimensions.
        head: the head, for a point with heads.
        scores: interchange accuracy (``"IIA"``) and its controls, by name, as in :class:`InterchangeResult`.
        notes: what was not run, and why.
    """

    subspace: np.ndarray
    losses: tuple[float, ...]
    hook_name: str
    rank: int
    head: int | None
    scores: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def iia(self) -> float:
        """Share of pairs whose intervened answer is the target."""
        return self.scores["IIA"]

    def interchange(self, source: Any, strength: Any = 1.0, **at: Any) -> Interchange:
        """Returns the interchange in the trained subspace, to run at ``hook_name``.

        Args:
            source: the source's activations.
            strength, **at: as for :class:`Interchange`; ``head`` is the trained one by default.
        """
        if self.head is not None:
            at = {"head": self.head} | at
        return Interchange(source, self.subspace, strength, **at)

    def __repr__(self) -> str:
        where = self.hook_name if self.head is None else f"{self.hook_name}, head {self.head}"
        width = max(map(len, self.scores))
        lines = [f"  {name.ljust(width)}  {value:.2f}" for name, value in self.scores.items()]
        loss = f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f} nats"
        return "\n".join([f"DASResult(rank {self.rank} at {where}, {loss})", *lines, *(f"  ({n})" for n in self.notes)])


@typed
def fit_das(
    model: HookedTransformer,
    hook_name: ActName,
    base_inputs: Any,
    source_inputs: Any,
    targets: Any,
    task_logits: Any = None,
    *,
    rank: int = 1,
    base_positions: Any = -1,
    source_positions: Any = -1,
    epochs: int = 20,
    batch_size: int = 128,
    lr: float = 1e-2,
    strength: float = 1.0,
    seed: int = 0,
    micro_batch_size: int | None = None,
    head: int | None = None,
    test: InterchangePairs | None = None,
    controls: Sequence[Control] = CONTROLS,
) -> DASResult:
    """Trains a subspace at one point by distributed alignment search (Geiger et al. 2023).

    The loss is the cross entropy of the targets over the task logits after ``h_b + strength * (h_s - h_b) B B^T``,
    minimised by Adam over a free matrix whose orthonormal factor is ``B``. Sources run once; base prompts run once up
    to the point's layer, and only from there in training.

    Args:
        model: the model; it is not changed.
        hook_name: the point, by any of its names.
        base_inputs, source_inputs: as ``base`` and ``source`` of :meth:`InterchangePairs.of`.
        targets: the counterfactual answers ``[pair]``, indices into the task logits.
        task_logits: as for :meth:`InterchangePairs.of`: token ids, a function of logits, or ``None`` for the whole
            vocabulary at the last position.
        rank: number of dimensions.
        base_positions, source_positions: where to interchange, a number or ``[pair]``, counted in each prompt's text.
        epochs, batch_size, lr, strength, micro_batch_size: as for :func:`train_interchange`.
        seed: where random draws start.
        head: for a point with heads, which.
        test: pairs to score on, whose ``named_pos`` has ``"site"`` or whose positions are the same numbers; by default
            those of the fit.
        controls: as for :func:`train_interchange`; ``()`` runs none.

    Returns:
        The subspace, the loss of each epoch, and its scores with their controls.

    Raises:
        InputError: as for :func:`train_interchange` and :meth:`InterchangePairs.of`; a point with heads and no
            ``head``.
        UnknownHookError: a point that the model does not have.
    """
    point = point_at(model, hook_name)
    if point.n_heads is not None and head is None:
        raise InputError(f"{point.name(point.layers[0])} has {point.n_heads} heads: say which with head=.")
    whole(rank, "rank", at_least=1)
    pairs = InterchangePairs.of(
        model, base_inputs, source_inputs, targets, task_logits=task_logits,
        pos={_SITE: base_positions}, source_pos={_SITE: source_positions},
    )  # fmt: skip
    found = train_interchange(
        model, pairs, point.name(point.layers[0]), rank=rank, pos=(_SITE,), heads=None if head is None else (head,),
        seeds=(seed,), test=test if test is None else _placed(model, test, base_positions, source_positions),
        epochs=epochs, batch_size=batch_size, micro_batch_size=micro_batch_size, lr=lr, strength=strength,
        controls=controls,
    )  # fmt: skip
    return _as_das(found, point.name(point.layers[0]), rank, head)


def _placed(model: HookedTransformer, test: InterchangePairs, base: Any, source: Any) -> InterchangePairs:
    """Returns test pairs that name the site."""
    if _SITE in test.named_pos:
        return test
    if np.ndim(base) or np.ndim(source):
        raise InputError(
            "The positions differ from pair to pair, and the test pairs do not say theirs: make them with "
            "InterchangePairs.of(..., pos={'site': [...]}, source_pos={'site': [...]})."
        )
    return test.with_pos(_SITE, base, source)


def _as_das(found: InterchangeResult, name: str, rank: int, head: int | None) -> DASResult:
    scores = found.at() | {"unpatched": found.unpatched, "chance": found.chance}
    return DASResult(
        subspace=found.basis(), losses=tuple(found.losses.reshape(len(found.losses)).tolist()), hook_name=name,
        rank=rank, head=head, scores=scores, notes=found.notes,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InterchangeScores:
    """What an interchange at one point does.

    Attributes:
        logits: task logits after it, ``[pair, class]``.
        answers: the largest of each, ``[pair]``.
        losses: cross entropy of each target, in nats, ``[pair]``.
        targets: ``[pair]``.
    """

    logits: np.ndarray
    answers: np.ndarray
    losses: np.ndarray
    targets: np.ndarray

    @property
    def iia(self) -> float:
        """Share of pairs whose answer is the target."""
        return float((self.answers == self.targets).mean())

    def __repr__(self) -> str:
        return f"InterchangeScores(IIA {self.iia:.2f}, loss {self.losses.mean():.3f} nats, {len(self.targets)} pairs)"


@typed
def score_interchange(
    model: HookedTransformer,
    pairs: InterchangePairs,
    hook_name: ActName,
    basis: Any = None,
    *,
    pos: Any = -1,
    source_pos: Any = None,
    head: int | None = None,
    strength: float = 1.0,
) -> InterchangeScores:
    """Runs the interchange of a given basis at one point.

    Args:
        model: the model.
        pairs: the pairs.
        hook_name: the point.
        basis: orthonormal columns ``[d, k]``; ``None`` sets the whole vector.
        pos: the position in the base prompts, a number or a name of ``pairs.named_pos``.
        source_pos: for a number, the position in the sources; the same by default.
        head: for a point with heads, which.
        strength: of the interchange.

    Raises:
        InputError: as for :func:`train_interchange`.
        InterventionError: columns that are not orthonormal, or do not fit the point.
    """
    point = point_at(model, hook_name)
    if point.n_heads is not None and head is None:
        raise InputError(f"{point.name(point.layers[0])} has {point.n_heads} heads: say which with head=.")
    settings = Settings(
        method="full", ranks=(1,), seeds=(0,), heads=None if head is None else (whole(head, "head"),), pos=pos,
        source_pos=source_pos, strength=strength, pairs_at_once=min(len(pairs), _AT_ONCE),
    )  # fmt: skip
    scores = Scores(model, pairs, point, settings)
    columns = np.zeros((point.width, 1)) if basis is None else np.asarray(orthonormal(basis, "score_interchange"))
    if len(columns) != point.width:
        raise InputError(
            f"The basis has {len(columns)} rows; {point.name(point.layers[0])} has {point.width} dimensions. Was it "
            "learned at another point?"
        )
    columns = columns[None].astype(scores.dtype)
    gate, whole_vector = np.ones(columns.shape[::2], scores.dtype), np.asarray([basis is None], scores.dtype)
    (rows,) = scores.layers()
    answers, losses, logits = scores.run(
        point.layers[0], rows, scores.sites, Subspace(columns, gate), whole_vector, np.zeros_like(columns), keep=True
    )
    assert logits is not None
    return InterchangeScores(logits=logits[0], answers=answers[0], losses=losses[0], targets=pairs.targets)
