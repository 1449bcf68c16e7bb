"""``Circuit``: a mask over the edges of a residual graph, or a stack of masks."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tljax.checks import is_traced, typed
from tljax.circuits.circuit_files import read_circuit_json, read_circuit_pt, write_circuit
from tljax.circuits.eap_ig_files import EAPIGGraph, write_eap_ig_pt
from tljax.circuits.graph import ResidualGraph
from tljax.circuits.picture import CircuitPicture, draw_circuit
from tljax.circuits.replacement import Ablation
from tljax.circuits.running import prepare_runs
from tljax.circuits.selection import pruned, read_mask, reads_of
from tljax.errors import CheckpointError, InputError
from tljax.model.hooked_transformer import HookedTransformer
from tljax.safetensors_files import own_errors

PROMPT_AXES = ("batch", "pos")
"""Axes of masks that differ by prompt and by position; the others are axes of stacks."""


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Some edges of a residual graph, as a mask; or several circuits of one graph, as a stack of masks.

    A pytree whose leaf is ``mask``: stacks run together, ``jax.grad`` gives the derivative with respect to each edge of
    a soft mask, ``jax.vmap`` goes over the first axis.

    Attributes:
        mask: ``[*axes, writer, reader]``: booleans, or numbers from 0 (absent) to 1 (present) for a soft mask. Entries
            that are no edges of the graph are set to zero.
        graph: the graph.
        axis_names: a name for each leading axis, ``"circuit"`` by default for one. ``"batch"`` and ``"pos"``, which
            come last, hold a mask of its own for each prompt and each position of the text.
        name: of the circuit, for titles.

    Raises:
        InputError: a mask of another shape, numbers that are no mask, or axis names that do not fit.

    Example:
        >>> graph = ResidualGraph(n_layers=1, n_heads=2, n_kv_heads=2, d_model=8)
        >>> circuit = Circuit.of(graph, ["input->a0.h1<v>", "a0.h1->logits", "input->m0"])
        >>> circuit.prune().names()
        ['input->a0.h1<v>', 'a0.h1->logits']
    """

    mask: Any
    graph: ResidualGraph
    axis_names: tuple[str, ...] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        mask = read_mask(self.mask, self.graph)
        names = (("circuit",) if mask.ndim == 3 else ()) if self.axis_names is None else tuple(self.axis_names)
        last = [axis for axis in PROMPT_AXES if axis in names]
        if len(names) != mask.ndim - 2 or len(set(names)) < len(names) or list(names[len(names) - len(last) :]) != last:
            raise InputError(
                f"axis_names={self.axis_names} for a mask of shape {mask.shape}: give a different name for each axis "
                "before [writer, reader]; 'batch' and 'pos', for masks of each prompt and position, come last."
            )
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "axis_names", names)

    @classmethod
    @typed
    def of(cls, graph: ResidualGraph | HookedTransformer, edges: Iterable[str], name: str = "") -> "Circuit":
        """Makes a circuit of named edges, such as ``["input->a0.h1<q>", "a0.h1->logits"]``.

        Args:
            graph: a graph, or a model.
            edges: names of edges.
            name: of the circuit.

        Raises:
            InputError: the graph lacks an edge; the message has the nearest name.
        """
        if isinstance(edges, str):
            raise InputError(f"edges is a list of names, such as [{edges!r}].")
        graph = graph if isinstance(graph, ResidualGraph) else ResidualGraph.of(graph)
        return cls(graph.mask(edges), graph, name=name)

    @classmethod
    @typed
    def full(cls, graph: ResidualGraph | HookedTransformer) -> "Circuit":
        """Returns the circuit of all edges, which is the model itself."""
        graph = graph if isinstance(graph, ResidualGraph) else ResidualGraph.of(graph)
        return cls(graph.edges, graph)

    @classmethod
    @typed
    def empty(cls, graph: ResidualGraph | HookedTransformer) -> "Circuit":
        """Returns the circuit without edges: all that is read comes from the source."""
        graph = graph if isinstance(graph, ResidualGraph) else ResidualGraph.of(graph)
        return cls(np.zeros(graph.shape, bool), graph)

    @classmethod
    def stack(cls, circuits: Sequence["Circuit"], name: str = "circuit") -> "Circuit":
        """Returns circuits of one graph as a stack along a new first axis of this name.

        Raises:
            InputError: no circuits, or circuits of different graphs or axes.
        """
        if not circuits or len({(one.graph, one.axes, one.mask.shape) for one in circuits}) > 1:
            raise InputError("A stack is made of one or more circuits of one graph with the same axes.")
        xp = np if all(isinstance(one.mask, np.ndarray) for one in circuits) else jnp
        masks = xp.stack([one.mask for one in circuits])
        return cls(masks, circuits[0].graph, (name, *circuits[0].axes))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the leading axes that the mask has; under ``vmap`` it has fewer than ``axis_names``."""
        names = self.axis_names or ()
        return names[len(names) - (self.mask.ndim - 2) :]

    @property
    def stack_axes(self) -> tuple[str, ...]:
        """The axes along which circuits differ, neither ``"batch"`` nor ``"pos"``."""
        return tuple(axis for axis in self.axes if axis not in PROMPT_AXES)

    @property
    def n_edges(self) -> Any:
        """Number of edges, or ``[*axes]``; for soft masks the sum of the mask."""
        total = self.mask.sum(axis=(-2, -1))
        return total if is_traced(total) or self.mask.ndim > 2 else total.item()

    @property
    def edges(self) -> np.ndarray:
        """Numbers of writer and reader of each edge, ``[edge, 2]``."""
        return np.argwhere(self._alone("edges"))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that an edge comes from or leads to, by layer; ``"logits"`` last."""
        mask, writers = self._alone("nodes"), self.graph.writers
        touched = mask.any(axis=1) | (mask.any(axis=0) @ reads_of(self.graph).T)
        names = [writer.name for writer, there in zip(writers, touched, strict=True) if there]
        return (*names, *(["logits"] if mask[:, -1].any() else []))

    def names(self) -> list[str]:
        """Returns the names of the edges."""
        return self.graph.names(self._alone("names()"))

    def prune(self) -> "Circuit":
        """Removes edges that are on no way from the token embedding to the logits (see :func:`pruned`)."""
        return self._with(pruned(self._known("prune()"), self.graph))

    @typed
    def plot(
        self, scores: Any = None, *, k: int | None = None, title: str | None = None, score_name: str = "effect"
    ) -> CircuitPicture:
        """Draws the circuit, layers upward: a picture that a notebook shows and ``.save(path)`` writes.

        Args:
            scores: a score for each edge, ``[writer, reader]``, which widths and colours of lines show.
            k, title, score_name: as in :func:`~tljax.circuits.draw_circuit`; the title is the name by default.
        """
        title = self.name or None if title is None else title
        return draw_circuit(self.graph, self.mask, scores, k=k, title=title, score_name=score_name)

    def complement(self) -> "Circuit":
        """Returns the circuit of all other edges."""
        return self._with(self.graph.edges & ~self.mask if self.mask.dtype == bool else self.graph.edges - self.mask)

    def union(self, other: "Circuit") -> "Circuit":
        """Returns the circuit of the edges of either (for soft masks the larger number)."""
        return self._with(_module(self, other).maximum(self.mask, self._mate(other)))

    def intersection(self, other: "Circuit") -> "Circuit":
        """Returns the circuit of the edges of both (for soft masks the smaller number)."""
        return self._with(_module(self, other).minimum(self.mask, self._mate(other)))

    def difference(self, other: "Circuit") -> "Circuit":
        """Returns the circuit of the edges that the other lacks."""
        return self.intersection(other.complement())

    def jaccard(self, other: "Circuit") -> Any:
        """Computes the share of common edges in those of either: 1 for equal circuits, also for two empty ones."""
        xp, mate = _module(self, other), self._mate(other)
        common = xp.minimum(self.mask, mate).sum(axis=(-2, -1))
        either = xp.maximum(self.mask, mate).sum(axis=(-2, -1))
        return xp.where(either == 0, 1.0, common / xp.maximum(either, 1e-30))

    @typed
    def run(
        self,
        model: HookedTransformer,
        prompt: Any,
        source: Any = None,
        *,
        metric: Any = None,
        ablation: Ablation = "patching",
        align: Any = None,
        batch_size: int | Literal["auto"] = "auto",
        max_batch: int | Literal["auto"] = "auto",
        progress: bool | None = None,
    ) -> jax.Array:
        """Runs the circuit alone: every edge outside it carries a replacement.

        What a reader reads is the residual stream of this very run plus, for each absent edge, the replacement minus
        what its writer writes in this run. All circuits of a stack run together.

        Args:
            model: the model, without hooks.
            prompt: the prompts that run.
            source: for ``ablation="patching"`` the prompts whose run the replacement comes from, one for each base
                prompt, or an ``ActivationCache`` of them; for means the prompts to average over.
            metric: a function of the logits, such as :class:`~tljax.patching.LogitDiff`.
            ablation: what absent edges carry: ``"patching"``, what the writer writes in the source's run; ``"zero"``;
                ``"mean"``, its mean over the source's prompts and their tokens; ``"positional_mean"``, its mean over
                the source's prompts at the same position of the text; the result of
                :func:`~tljax.circuits.mean_activations`; or constants by hook name.
            align: ``[batch, pos]``, which token of the source stands for each token of the base, -1 for none (it keeps
                the base run's value); needed if their texts differ in length (:func:`tljax.text.align`).
            batch_size: prompts that run at once.
            max_batch: most circuits that run at once.
            progress: whether to show a progress bar.

        Returns:
            With a metric, its value ``[*stack axes]`` or ``[*stack axes, batch]``, as the metric returns one number or
            one for each prompt; otherwise logits ``[*stack axes, batch, pos, d_vocab_out]``.

        Raises:
            InputError: the model is not the graph's, or the source does not fit the prompts.
        """
        runs = prepare_runs(
            model,
            self.graph,
            prompt,
            source,
            ablation=ablation,
            align=align,
            batch_size=batch_size,
            max_batch=max_batch,
        )
        masks = runs.laid_out(self.mask, self.axes)
        sizes = self.mask.shape[: len(self.stack_axes)]
        found = runs.logits(masks) if metric is None else runs.metrics(masks, runs.measure(metric), progress)
        return found.reshape(*sizes, *found.shape[1:])

    @typed
    def to_json(
        self,
        path: str | os.PathLike[str],
        *,
        model: HookedTransformer | None = None,
        layout: Literal["tljax", "eap-ig"] = "tljax",
    ) -> None:
        """Writes the circuit as JSON.

        Args:
            path: the file, replaced atomically.
            model: a model whose fingerprint is stored, so that the file is refused for others.
            layout: ``"tljax"``, or ``"eap-ig"`` for a file that EAP-IG and the MIB circuit track read (one hard
                circuit, without scores; key and value heads are counted by query head).

        Raises:
            InputError: a circuit that the layout has no place for, or another model's.
        """
        write_circuit(path, self, self._known("to_json()"), model, layout)

    @classmethod
    @typed
    def from_json(cls, path: str | os.PathLike[str], model: HookedTransformer | None = None) -> "Circuit":
        """Reads a circuit that :meth:`to_json` or EAP-IG wrote.

        Args:
            path: the file.
            model: the model that it must belong to. EAP-IG's circuits of a grouped-query model belong to
                ``model.set_ungroup_grouped_query_attention(True)``.

        Raises:
            CheckpointError: the file is missing, damaged, names what its graph lacks, or belongs to another model.
            InputError: its graph is not the model's.
        """
        return cls._of_file(path, read_circuit_json(path, model))

    @typed
    def to_pt(self, path: str | os.PathLike[str]) -> None:
        """Writes the circuit as EAP-IG's ``.pt``, without scores; this needs torch.

        Raises:
            UnsupportedModelError: torch is not installed.
            InputError: a circuit that the layout has no place for, as in :meth:`to_json`.
        """
        write_eap_ig_pt(path, EAPIGGraph.of(self.graph, self._known("to_pt()")))

    @classmethod
    @typed
    def from_pt(cls, path: str | os.PathLike[str], model: HookedTransformer | None = None) -> "Circuit":
        """Reads a circuit from EAP-IG's ``.pt``; this needs torch, and runs no code of the file.

        Raises:
            UnsupportedModelError: torch is not installed.
            CheckpointError: the file is missing, damaged or something else.
            InputError: its graph is not the model's.
        """
        return cls._of_file(path, read_circuit_pt(path, model))

    @classmethod
    def _of_file(cls, path: str | os.PathLike[str], fields: dict[str, Any]) -> "Circuit":
        with own_errors(path, "Write it anew with to_json.", CheckpointError):
            return cls(**fields)

    def __getitem__(self, index: Any) -> "Circuit":
        """Returns the part of a stack at a number, a slice or numbers along its first axis."""
        if not self.axes:
            raise InputError("This is one circuit, not a stack: there is nothing to index. Its array is circuit.mask.")
        if not isinstance(index, int | np.integer | slice | list | np.ndarray):
            raise InputError(f"A stack of circuits is indexed along {self.axes[0]!r} by numbers; got {index!r}.")
        part = self.mask[index]
        return Circuit(part, self.graph, self.axes[self.mask.ndim - part.ndim :], self.name)

    def __contains__(self, edge: str) -> bool:
        """Whether the circuit has the edge of this name."""
        return bool(self._alone("in")[self.graph.edge(edge)])

    def __len__(self) -> int:
        """Number of circuits along the first axis of a stack; edges of one circuit are counted by ``n_edges``."""
        if not self.axes:
            raise InputError("This is one circuit; the number of its edges is circuit.n_edges.")
        return self.mask.shape[0]

    def __iter__(self) -> Iterator["Circuit"]:
        return (self[number] for number in range(len(self)))

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        title = f"{self.name!r}, " if self.name else ""
        mask = self.mask
        if not isinstance(mask, np.ndarray | jax.Array) or is_traced(mask):
            return f"Circuit({title}traced)"
        kind = "" if mask.dtype == bool else "soft, "
        counts = np.asarray(self.n_edges)
        low, high = counts.min(initial=self.graph.n_edges), counts.max(initial=0)
        said = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        axes = "".join(f"{axis} {size} × " for axis, size in zip(self.axes, mask.shape, strict=False))
        return f"Circuit({title}{kind}{axes}{said} of {self.graph.n_edges} edges)"

    def _with(self, mask: Any) -> "Circuit":
        return Circuit(mask, self.graph, self.axes, self.name)

    def _mate(self, other: "Circuit") -> Any:
        if not isinstance(other, Circuit) or other.graph != self.graph:
            raise InputError("Circuits are compared edge by edge: both must be of the same graph.")
        return other.mask

    def _known(self, what: str) -> np.ndarray:
        if is_traced(self.mask):
            raise InputError(f"{what} needs to know which edges there are: call it outside jax.jit.")
        return np.asarray(self.mask)

    def _alone(self, what: str) -> np.ndarray:
        """Returns the mask of one circuit, boolean."""
        if self.axes:
            raise InputError(f"{what} is of one circuit, and this is a stack with axes {self.axes}: take circuit[0].")
        return self._known(what) != 0

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        return ((jax.tree_util.GetAttrKey("mask"), self.mask),), (self.graph, self.axis_names, self.name)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: Sequence[Any]) -> "Circuit":
        circuit = object.__new__(cls)  # leaves may be anything while jax transforms, so nothing is checked
        fields = {"mask": leaves[0], "graph": static[0], "axis_names": static[1], "name": static[2]}
        for name, value in fields.items():
            object.__setattr__(circuit, name, value)
        return circuit


def _module(*circuits: Circuit) -> Any:
    return np if all(isinstance(one.mask, np.ndarray) for one in circuits) else jnp
