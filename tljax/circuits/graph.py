"""The residual graph of a model: what writes to the residual stream, what reads from it, and the edges between.

Writers are the token embedding, every attention head and every MLP. Readers are the query, key and value inputs of
every head, the input of every MLP, and the logits. Edges run from a writer to each reader that comes after it. Names,
order and counts are those of EAP-IG (Hanna et al. 2024, "Have Faith in Faithfulness"), except that key/value heads of
grouped-query attention are readers of their own (:attr:`ResidualGraph.n_kv_heads`).
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from tljax.checks import typed
from tljax.config import HookedTransformerConfig
from tljax.errors import InputError, nearest
from tljax.hooks.splices import refuse_splices

WriterKind = Literal["input", "head", "mlp", "expert"]
ReaderKind = Literal["q", "k", "v", "mlp", "logits"]


@dataclasses.dataclass(frozen=True)
class Writer:
    """A part of the model that adds to the residual stream.

    Attributes:
        name: such as ``"input"``, ``"a3.h5"``, ``"m3"``, ``"m3.e7"``.
        layer: its layer, -1 for the token embedding.
        kind: ``"input"``, ``"head"``, ``"mlp"`` or ``"expert"``.
        number: which head or expert; 0 for the others.
    """

    name: str
    layer: int
    kind: WriterKind
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Reader:
    """A part of the model that reads the residual stream.

    Attributes:
        name: such as ``"a3.h5<q>"``, ``"a3.kv1<k>"``, ``"m3"``, ``"logits"``.
        layer: its layer, ``n_layers`` for the logits.
        kind: ``"q"``, ``"k"``, ``"v"``, ``"mlp"`` or ``"logits"``.
        number: which query head or key/value head; 0 for the others.
    """

    name: str
    layer: int
    kind: ReaderKind
    number: int = 0


@dataclasses.dataclass(frozen=True)
class ResidualGraph:
    """Writers, readers and edges of a model's residual stream. Hashable, so it can be static under ``jit``.

    Position embeddings and biases are not writers: they are the same in all runs of prompts of the same positions.

    Attributes:
        n_layers: number of layers.
        n_heads: query heads of a layer.
        n_kv_heads: key/value heads of a layer; fewer than ``n_heads`` under grouped-query attention.
        d_model: width of the residual stream.
        parallel_attn_mlp: whether MLPs read the stream before their layer's attention, so that no edge joins them.
        attn_only: whether there are no MLPs.
        experts: for each layer, the number of experts that are writers of their own (the last one of a layer with a
            shared expert is the shared one); 0 where the whole MLP is one writer.

    Example:
        >>> graph = ResidualGraph(n_layers=12, n_heads=12, n_kv_heads=12, d_model=768)
        >>> graph.n_writers, graph.n_readers, graph.n_edges
        (157, 445, 32491)
        >>> graph.edge("a0.h1->m3")
        (2, 147)
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    parallel_attn_mlp: bool = False
    attn_only: bool = False
    experts: tuple[int, ...] = ()

    @functools.cached_property
    def writers(self) -> tuple[Writer, ...]:
        """The writers in order: the token embedding, then by layer its heads and its MLP (or experts)."""
        writers = [Writer("input", -1, "input")]
        for layer in range(self.n_layers):
            writers += [Writer(f"a{layer}.h{head}", layer, "head", head) for head in range(self.n_heads)]
            experts = self.experts[layer] if self.experts else 0
            if experts:
                writers += [Writer(f"m{layer}.e{expert}", layer, "expert", expert) for expert in range(experts)]
            elif not self.attn_only:
                writers.append(Writer(f"m{layer}", layer, "mlp"))
        return tuple(writers)

    @functools.cached_property
    def readers(self) -> tuple[Reader, ...]:
        """The readers in order: by layer its queries, keys, values and MLP; then the logits."""
        key_name = "h" if self.n_kv_heads == self.n_heads else "kv"
        readers: list[Reader] = []
        for layer in range(self.n_layers):
            readers += [Reader(f"a{layer}.h{head}<q>", layer, "q", head) for head in range(self.n_heads)]
            for kind in ("k", "v"):
                readers += [
                    Reader(f"a{layer}.{key_name}{head}<{kind}>", layer, kind, head) for head in range(self.n_kv_heads)
                ]
            if not self.attn_only:
                readers.append(Reader(f"m{layer}", layer, "mlp"))
        return (*readers, Reader("logits", self.n_layers, "logits"))

    @property
    def n_writers(self) -> int:
        """Number of writers."""
        return len(self.writers)

    @property
    def n_readers(self) -> int:
        """Number of readers."""
        return len(self.readers)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.edges.sum())

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_writers, n_readers)``, the shape of masks and scores."""
        return self.n_writers, self.n_readers

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """Which pairs are edges, boolean ``[writer, reader]`` (read-only)."""
        writer = np.asarray([writer.layer for writer in self.writers])[:, None]
        reader = np.asarray([reader.layer for reader in self.readers])[None]
        edges = writer < reader
        if not self.parallel_attn_mlp:
            heads = np.asarray([writer.kind == "head" for writer in self.writers])[:, None]
            mlps = np.asarray([reader.kind == "mlp" for reader in self.readers])[None]
            edges |= heads & mlps & (writer == reader)
        edges.flags.writeable = False
        return edges

    def writers_of(self, layer: int) -> slice:
        """Returns which writers belong to a layer (-1 for the token embedding), as a slice of the writer axis."""
        return self._slices[0][layer]

    def readers_of(self, layer: int, kind: ReaderKind | None = None) -> slice:
        """Returns which readers belong to a layer (``n_layers`` for the logits), or those of one kind, as a slice."""
        return self._slices[1][layer, kind]

    @functools.cached_property
    def _slices(self) -> tuple[dict[int, slice], dict[tuple[int, str | None], slice]]:
        writers = _runs({number: writer.layer for number, writer in enumerate(self.writers)})
        by_layer = _runs({number: (reader.layer, None) for number, reader in enumerate(self.readers)})
        by_kind = _runs({number: (reader.layer, reader.kind) for number, reader in enumerate(self.readers)})
        return writers, by_layer | by_kind

    @functools.cached_property
    def writer_numbers(self) -> Mapping[str, int]:
        """The number of each writer, by name."""
        return {writer.name: number for number, writer in enumerate(self.writers)}

    @functools.cached_property
    def reader_numbers(self) -> Mapping[str, int]:
        """The number of each reader, by name."""
        return {reader.name: number for number, reader in enumerate(self.readers)}

    def writer(self, name: str) -> int:
        """Returns the number of a writer.

        Raises:
            InputError: no writer has this name; the message has the nearest.
        """
        return self._number(name, self.writer_numbers, "writer")

    def reader(self, name: str) -> int:
        """Returns the number of a reader.

        Raises:
            InputError: no reader has this name; the message has the nearest.
        """
        return self._number(name, self.reader_numbers, "reader")

    def edge(self, name: str) -> tuple[int, int]:
        """Returns the numbers of writer and reader of an edge such as ``"a0.h1->m3"`` or ``"m0->a5.h2<q>"``.

        Raises:
            InputError: the name is no edge, or the graph lacks it.
        """
        writer, arrow, reader = name.partition("->")
        if not arrow:
            raise InputError(f"{name!r} is not the name of an edge: write writer->reader, such as 'input->logits'.")
        numbers = self.writer(writer), self.reader(reader)
        if not self.edges[numbers]:
            raise InputError(f"There is no edge {name!r}: {reader} does not come after {writer} in this model.")
        return numbers

    def edge_name(self, writer: int, reader: int) -> str:
        """Returns the name of the edge between a writer and a reader, given by number."""
        return f"{self.writers[writer].name}->{self.readers[reader].name}"

    def mask(self, edges: Iterable[str] = ()) -> np.ndarray:
        """Returns a mask ``[writer, reader]`` that is true at the named edges."""
        mask = np.zeros(self.shape, bool)
        for name in edges:
            mask[self.edge(name)] = True
        return mask

    def names(self, mask: Any) -> list[str]:
        """Returns the names of the edges that are true in a mask ``[writer, reader]``."""
        chosen = np.asarray(mask).astype(bool) & self.edges
        return [self.edge_name(writer, reader) for writer, reader in np.argwhere(chosen)]

    @property
    def ungrouped(self) -> "ResidualGraph":
        """The graph with a key and a value reader for each query head, as EAP-IG has it; itself if it has them."""
        return dataclasses.replace(self, n_kv_heads=self.n_heads)

    def group(self, scores: Any) -> Any:
        """Sums scores of the ungrouped graph's key and value readers over the query heads that share a key/value head.

        Args:
            scores: ``[..., writer, reader]`` of :attr:`ungrouped`, of NumPy or JAX.

        Returns:
            ``[..., writer, reader]`` of this graph.

        Raises:
            InputError: they are of another shape.
        """
        array = _of_shape(scores, self.ungrouped.shape, "scores of the ungrouped graph")
        one_hot = self._group_of[:, None] == np.arange(self.n_readers)
        return array @ one_hot.astype(array.dtype)

    def ungroup(self, mask: Any) -> Any:
        """Gives each query head's key and value readers what this graph has at their key/value head.

        Args:
            mask: ``[..., writer, reader]`` of this graph, of NumPy or JAX.

        Returns:
            ``[..., writer, reader]`` of :attr:`ungrouped`.

        Raises:
            InputError: it is of another shape.
        """
        return _of_shape(mask, self.shape, "a mask of this graph")[..., self._group_of]

    @functools.cached_property
    def _group_of(self) -> np.ndarray:
        """This graph's reader for each reader of the ungrouped one."""
        heads = self.n_heads // self.n_kv_heads
        return np.asarray([
            self.readers_of(reader.layer, reader.kind).start + reader.number // (heads if reader.kind in "kv" else 1)
            for reader in self.ungrouped.readers
        ])  # fmt: skip

    def check(self, cfg: HookedTransformerConfig) -> None:
        """Checks that this is the graph of a model.

        Raises:
            InputError: it is another model's; the message says what differs.
        """
        _refuse_dictionaries(cfg)
        own = _fields_of(cfg)
        differing = {name: value for name, value in own.items() if getattr(self, name) != value}
        if differing:
            said = ", ".join(f"{name}={getattr(self, name)} (the model: {value})" for name, value in differing.items())
            raise InputError(f"This graph belongs to another model: {said}. Make one with ResidualGraph.of(model).")

    @classmethod
    @typed
    def of(cls, model: Any, *, experts: bool = False) -> "ResidualGraph":
        """Makes the graph of a model.

        Args:
            model: a :class:`~tljax.HookedTransformer` or its config.
            experts: whether each expert of a mixture is a writer of its own, rather than its layer's MLP as a whole.

        Raises:
            InputError: a model whose residual stream is itself normalised, so that nothing added is found again later.
        """
        cfg = model if isinstance(model, HookedTransformerConfig) else model.cfg
        if cfg.use_normalization_of_residual:
            raise InputError(
                "A residual graph follows what parts add to the residual stream from layer to layer, and this model "
                "normalises the whole stream after each addition (use_normalization_of_residual), so that nothing "
                "added is found again in later layers. Patch activations with sweep instead."
            )
        _refuse_dictionaries(cfg)
        counts = tuple(_experts(cfg, layer) for layer in range(cfg.n_layers)) if experts else ()
        if experts and not any(counts):
            raise InputError("experts=True asks for each expert as a writer, and this model has no experts.")
        return cls(**_fields_of(cfg), experts=counts)

    def _number(self, name: str, numbers: Mapping[str, int], what: str) -> int:
        if name in numbers:
            return numbers[name]
        raise InputError(f"There is no {what} {name!r} in this graph.{nearest(name, numbers)}")


def _refuse_dictionaries(cfg: HookedTransformerConfig) -> None:
    """Raises InputError if dictionaries are spliced in: edges would run through them as if they were not there."""
    refuse_splices(
        cfg.splices,
        "A residual graph joins what heads and MLPs put out to what reads it",
        "Make the graph of the model without it, ResidualGraph.of(model.without_dictionaries()); for effects of its "
        "features see tljax.dictionaries.attribution, and sweep.",
    )


def _fields_of(cfg: HookedTransformerConfig) -> dict[str, Any]:
    return {
        "n_layers": cfg.n_layers, "n_heads": cfg.n_heads, "n_kv_heads": cfg.kv_heads, "d_model": cfg.d_model,
        "parallel_attn_mlp": cfg.parallel_attn_mlp, "attn_only": cfg.attn_only,
    }  # fmt: skip


def _of_shape(array: Any, shape: tuple[int, int], what: str) -> Any:
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if array.shape[-2:] != shape:
        raise InputError(f"The array has shape {array.shape}; {what} has [..., {shape[0]}, {shape[1]}].")
    return array


def _experts(cfg: HookedTransformerConfig, layer: int) -> int:
    """Returns how many experts of a layer write: those of the router, and the shared one."""
    if not cfg.layer_kind(layer).experts:
        return 0
    assert cfg.num_experts is not None
    return cfg.num_experts + (cfg.d_shared_expert is not None)


def _runs(keys: Mapping[int, Any]) -> dict[Any, slice]:
    """Returns the slice of the numbers that have each key; these are consecutive."""
    slices: dict[Any, slice] = {}
    for number, key in keys.items():
        slices[key] = slice(slices[key].start if key in slices else number, number + 1)
    return slices
