"""``LearnedCircuit``: the masks and scores that learning found, and how it went."""

import dataclasses
from typing import Any

import jax
import numpy as np

from tljax.checks import whole
from tljax.circuits.circuit import Circuit
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.search.gates import most_open
from tljax.circuits.search.training import Form, Method, Objective, chances
from tljax.errors import InputError


@dataclasses.dataclass(frozen=True)
class LearningSettings:
    """How a circuit was learned; arguments of :func:`learn_circuit`, defaults filled in.

    Attributes:
        method, ablation, objective: as given; ``ablation`` is ``"values"`` if an array was.
        seed, target, penalty: one for each circuit.
        steps, batch_size, n_prompts, learning_rate: numbers.
    """

    method: Method
    ablation: str
    objective: Objective
    seed: tuple[int, ...]
    target: tuple[float, ...]
    penalty: tuple[float, ...]
    steps: int
    batch_size: int
    n_prompts: int
    learning_rate: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LearnedCircuit:
    """A circuit found by :func:`learn_circuit`, or a stack of them with a leading axis ``circuit``.

    Attributes:
        mask: the edges of the circuit, boolean ``[writer, reader]``.
        scores: what was learned of each edge, ``[writer, reader]``, -inf where there is no edge: the log odds of its
            gate. A larger score is a gate that is more often open.
        distance: how far the circuit is from what is wanted of it, mean over prompts: ``KL(model || circuit)`` in nats
            after each prompt, unless a metric was given.
        empty_distance: the same without any edge.
        history: for each step ``[step]``: ``"loss"``, ``"distance"`` and ``"kept"``, the expected share of edges.
        constants: what absent edges carry, activations by full hook name, if that was learned; ``Circuit.run`` takes
            them as ``ablation=``.
        graph: the model's graph.
        settings: how it was learned.
    """

    mask: Any
    scores: Any
    distance: Any
    empty_distance: Any
    history: dict[str, Any]
    constants: Any
    graph: ResidualGraph = dataclasses.field(metadata={"static": True})
    settings: LearningSettings = dataclasses.field(metadata={"static": True})

    @property
    def n_edges(self) -> Any:
        """Number of edges of the circuit, or of each one of a stack."""
        return np.asarray(self.mask).sum(axis=(-2, -1))[()]

    @property
    def chances(self) -> Any:
        """The chance that each edge's gate is open, by its score alone, ``[writer, reader]``; 0 where there is none."""
        return chances(Form("ugs" if self.settings.method == "ugs" else "edge_pruning"), {"edges": self.scores})

    def circuit(self, name: str = "") -> Circuit:
        """Returns the circuit, or the stack of them, to run, prune, compare or save."""
        return Circuit(self.mask, self.graph, name=name)

    def top(self, k: int) -> np.ndarray:
        """Returns a mask ``[writer, reader]`` of the ``k`` edges of highest score, to compare circuits of one size."""
        k = whole(k, "k", 0, self.graph.n_edges)
        stack = np.asarray(self.scores).reshape(-1, *self.graph.shape)
        masks = [most_open(scores, self.graph.edges, k) for scores in stack]
        return np.stack(masks).reshape(np.shape(self.scores))

    def __getitem__(self, index: Any) -> "LearnedCircuit":
        """Returns one circuit of a stack."""
        if np.ndim(self.mask) < 3:
            raise InputError("This is one circuit, not a stack of them: there is nothing to choose.")
        taken = jax.tree.map(lambda leaf: leaf[index], self)
        own = {name: np.atleast_1d(getattr(self.settings, name)[index]) for name in ("seed", "target", "penalty")}
        settings = dataclasses.replace(self.settings, **{name: tuple(value.tolist()) for name, value in own.items()})
        return dataclasses.replace(taken, settings=settings)

    def __repr__(self) -> str:
        columns = self.n_edges, self.distance, self.empty_distance
        lines = [
            f"{int(count)} of {self.graph.n_edges} edges, distance {float(distance):.4g} (no edges: {float(empty):.4g})"
            for count, distance, empty in zip(*map(np.atleast_1d, columns), strict=True)
        ]
        how = f"{self.settings.method}, {self.settings.steps} steps, ablation {self.settings.ablation}"
        return f"LearnedCircuit({how}; " + "; ".join(lines) + ")"
