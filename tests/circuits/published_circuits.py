"""What tljax computes for a folder of golden numbers of circuits, under the names of the stored arrays.

Stored scores are of a loss, minus the metric: positive where corrupting raises the loss. EAP-IG's are also divided by
the number of prompts, although its metric is a mean already. Queries, keys and values are counted by query head.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from tljax import Add, Batch, HookedTransformer
from tljax.circuits import Circuit, ResidualGraph, edge_scores, mean_activations, select, top_nodes
from tljax.circuits.writers import writer_outputs, writer_points
from tljax.patching import LogitDiff, sweep

FOLDER = Path(__file__).parents[3] / "shared" / "goldens" / "circuits"
TAGS = sorted(path.name for path in FOLDER.glob("*") if path.is_dir())

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "EAP": ("eap", {}), "EAP.naive_contraction": ("eap", {}), "EAP.zero": ("eap", {"ablation": "zero"}),
    "EAP.mean": ("eap", {"ablation": "mean"}), "EAP.mean-positional": ("eap", {"ablation": "positional_mean"}),
    "EAP-IG-inputs.steps5": ("eap-ig", {}), "EAP-IG-inputs.k1to5.steps5": ("eap-ig", {"grid": "left"}),
    "EAP-IG-inputs.gauss64": ("eap-ig", {"steps": 64, "grid": "gauss"}), "clean-corrupted": ("clean-corrupted", {}),
    "EAP-IG-activations.steps5": ("eap-ig-activations", {}),
    "EAP-IG-activations.zero.steps5": ("eap-ig-activations", {"ablation": "zero"}),
    "mask-IG.gauss64": ("mask-ig", {"steps": 64}), "information-flow-routes": ("information-flow", {}),
    "exact": ("exact", {}), "exact.zero": ("exact", {"ablation": "zero"}),
}  # fmt: skip
"""Stored name of edge scores: method and options."""
ABLATIONS = {"patching": "patching", "zero": "zero", "mean": "mean", "mean-positional": "positional_mean"}


class Golden:
    """One folder, and its model: as it is, or with its weights processed as usual.

    Attributes:
        arrays: all stored arrays by file and name.
        model: key and value heads are counted by query head.
        native: they are counted as they are.
    """

    def __init__(self, tag: str, processed: bool = False) -> None:
        self.path, self.processed = FOLDER / tag, processed
        self.reference = "eapig_processed" if processed else "eapig_unprocessed"
        load = HookedTransformer.from_pretrained if processed else HookedTransformer.from_pretrained_no_processing
        self.native = load(str(self.path / "model"))
        self.model = self.native.set_ungroup_grouped_query_attention(True)
        self.graph = ResidualGraph.of(self.model)
        data = np.load(self.path / "data.npz")
        mask = np.arange(data["clean"].shape[1]) < data["lengths"][:, None]
        self.clean, self.corrupted = (Batch.from_mask(data[side], mask, "right") for side in ("clean", "corrupt"))
        self.last, self.n_prompts, self.is_full = data["lengths"] - 1, len(mask), bool(mask.all())
        self.metric = LogitDiff(data["answer"], data["wrong"])
        self.stored = {name: dict(np.load(self.path / f"{name}.npz")) for name in ("brute_unprocessed", self.reference)}

    def told(self, name: str) -> Any:
        return json.loads((self.path / f"{name}.json").read_text())

    @functools.cached_property
    def by_position(self) -> np.ndarray:
        """EAP of each prompt and position."""
        values = edge_scores(
            self.model, self.clean, self.corrupted, self.metric, reduce="none", axes=("pos",), progress=False
        ).values
        return -np.asarray(values)

    @functools.cache  # noqa: B019
    def edges(self, name: str, post_norm: str = "ignored") -> np.ndarray:
        """Scores of each prompt in the stored sign, ``[batch, writer, reader]``; EAP-IG ignores norms after blocks."""
        method, options = METHODS[name]
        scores = edge_scores(
            self.model, self.clean, self.clean if "mean" in name else self.corrupted, self.metric, method,  # type: ignore[arg-type]
            reduce="none", post_norm=post_norm, progress=False, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        return (1 if method == "information-flow" else -1) * np.asarray(scores.values)

    def twice_averaged(self, name: str) -> np.ndarray:
        """Mean scores as EAP-IG gives them for one batch: those of a mean metric, divided by the prompts once more."""
        quirk = "activations" in name and self.model.cfg.positional_embedding_type == "rotary"
        values = (
            self.without_gradient_at_inputs("zero" if "zero" in name else "patching") if quirk else self.edges(name)
        )
        return values.mean(axis=0) / self.n_prompts

    def in_batches(self, size: int) -> np.ndarray:
        """EAP as EAP-IG gives it for batches: the sum of the batches' means over the number of prompts."""
        values = self.edges("EAP")
        means = [values[first : first + size].mean(axis=0) for first in range(0, self.n_prompts, size)]
        return sum(means) / self.n_prompts

    def native_edges(self, method: str) -> np.ndarray:
        """The same with each key and value head once."""
        values = edge_scores(
            self.native, self.clean, self.corrupted, self.metric, method, reduce="none", progress=False  # type: ignore[arg-type]
        ).values  # fmt: skip
        return -np.asarray(values)

    def without_gradient_at_inputs(self, ablation: str) -> np.ndarray:
        """IG along activations less what layer 0's queries, keys and values receive while the embeddings move.

        So it is in the reference where positions are rotary: there its replaced embeddings carry no gradient.
        """
        name = {"patching": "EAP-IG-activations.steps5", "zero": "EAP-IG-activations.zero.steps5"}[ablation]
        values = self.edges(name).copy()
        ends = [self.model.run_with_cache(one, names_filter="hook_embed")[1]["hook_embed"] for one in
                (self.clean, self.corrupted)]  # fmt: skip
        target = np.zeros_like(ends[0]) if ablation == "zero" else np.asarray(ends[1])
        change, n_outputs = target - np.asarray(ends[0]), 1 + 2 * self.graph.n_layers
        for step in range(5):
            moved = self.model.with_hooks([("hook_embed", Add(np.float32(step / 5) * change))])
            points = [f"blocks.0.hook_{letter}_input" for letter in "qkv"]
            grads = moved.run_with_grads(self.clean, self.metric, points).grads
            for letter in "qkv":
                product = np.einsum("bphd,bpd->bh", grads[f"blocks.0.hook_{letter}_input"], change)
                values[:, 0, self.graph.readers_of(0, letter)] += product / (5 * n_outputs)
        return values

    @functools.cached_property
    def products(self) -> dict[str, np.ndarray]:
        """Change times gradient at every writer's own output, ``[batch, pos, writer, d_model]``; MLPs also in EAP-IG's
        way, with the gradient at their input."""
        layers = range(self.graph.n_layers)
        names = ["hook_embed", *(f"blocks.{layer}.{point}" for layer in layers
                                 for point in ("attn.hook_result", "hook_mlp_in", "hook_mlp_out"))]  # fmt: skip
        _, cache, grads = self.model.run_with_grads(self.clean, self.metric, names)
        other = self.model.run_with_cache(self.corrupted, names_filter=names)[1]
        text = np.asarray(self.clean.mask)[:, :, None, None]

        def product(point: str, read: str | None = None) -> np.ndarray:
            found = np.asarray((other[point] - cache[point]) * grads[read or point])
            return np.where(text, -(found if found.ndim == 4 else found[:, :, None]), 0)

        found = {}
        for kind, read in (("right", "hook_mlp_out"), ("mlp_in_quirk", "hook_mlp_in")):
            parts = [product("hook_embed")]
            for layer in layers:
                parts.append(product(f"blocks.{layer}.attn.hook_result"))
                parts.append(product(f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.{read}"))
            found[kind] = np.concatenate(parts, axis=2)
        return found

    @functools.cache  # noqa: B019
    def patched(self, *pos: str) -> np.ndarray:
        """Rise of the metric with each writer patched exactly, ``[writer, (pos,) batch]``."""

        def effect(name: str, axes: tuple[str, ...]) -> np.ndarray:
            patch = sweep(
                self.model, self.clean, self.corrupted, self.metric, name, axes, reduce="none", progress=False
            )
            return np.asarray(patch.effect())

        z, mlp = effect("z", ("head", *pos)), effect("mlp_out", pos)
        layers = [part for heads, own in zip(z, mlp, strict=True) for part in (heads, own[None])]
        return np.concatenate([effect("embed", pos)[None], *layers])

    def heads(self, letter: str) -> np.ndarray:
        """Rise of the metric with one query or key vector patched, ``[batch, layer, head, pos]``."""
        patch = sweep(
            self.model, self.clean, self.corrupted, self.metric, letter, ("head", "pos"), reduce="none", progress=False
        )  # fmt: skip
        return np.moveaxis(np.asarray(patch.effect()), -1, 0)

    def means(self, by_position: bool) -> np.ndarray:
        """Means of what writers write over the clean prompts, ``[pos, writer, d_model]`` or ``[writer, d_model]``."""
        means = mean_activations(self.model, self.clean, self.graph, by_position=by_position)
        assert list(means) == list(writer_points(self.graph))
        whole = {name: value[None] for name, value in means.items()}
        written = np.asarray(writer_outputs(self.model.cfg, self.model.params, self.graph, whole))[0]
        return written if by_position else written[0]

    def selected(self, name: str) -> np.ndarray:
        """A selection by our own scores, by its stored name: ``select.<scores>.<rule><size>.<sign>.<kept>``."""
        scores, rule, size, sign, kept = selection(name)
        by: Any = "absolute" if sign == "abs" else "lowers"
        if scores.startswith("node"):
            values = self.products["mlp_in_quirk"].sum(axis=(1, 3)).mean(axis=0)
            return top_nodes(-values, self.graph, int(size), by, whole_rows=True)
        values = -self.edges(scores).mean(axis=0)
        scale = 1 if scores == "exact" else self.n_prompts
        how: Any = {"threshold": float(size) * scale} if rule == "threshold" else {"top": int(size)}
        return select(values, self.graph, **how, by=by, greedy=rule == "greedy", prune=kept == "pruned")

    def nodes_of(self, name: str) -> np.ndarray:
        """Which writers a selection has."""
        names = Circuit(self.selected(name), self.graph).nodes
        return np.asarray([writer.name in names for writer in self.graph.writers])

    @functools.cached_property
    def evaluations(self) -> dict[str, np.ndarray]:
        """Metrics and last logits of the circuits of EAP's best edges, as stored under ``evaluate.``."""
        names = [name for name in self.stored[self.reference] if re.fullmatch(r"evaluate.*\.patching", name)]
        masks = [
            self.selected(f"select{name.removeprefix('evaluate').removesuffix('patching')}pruned") for name in names
        ]
        circuits, found = Circuit(np.stack(masks), self.graph), {}
        for stored, ablation in ABLATIONS.items():
            source = {"zero": None, "patching": self.corrupted}.get(ablation, self.clean)
            run = functools.partial(circuits.run, self.model, self.clean, source, ablation=ablation, progress=False)
            metrics, logits = run(metric=self.metric), run() if ablation in ("patching", "mean") else None
            for number, name in enumerate(names):
                name = name.removesuffix("patching") + stored
                found[name] = np.asarray(metrics[number])
                if logits is not None:
                    last = np.asarray(logits[number])[np.arange(self.n_prompts), self.last]
                    found[f"{name}.logits_last"] = last
        return found

    @functools.cached_property
    def runs(self) -> dict[str, np.ndarray]:
        """Last logits and metrics of both sides, by stored name."""
        found = {}
        for side, batch in (("clean", self.clean), ("corrupt", self.corrupted)):
            logits = self.model(batch)
            found[f"logits.{side}.last"] = np.asarray(logits)[np.arange(self.n_prompts), self.last]
            found[f"metric.{side}"] = np.asarray(self.metric.in_text(batch.mask)(logits))
        return found


def selection(name: str) -> tuple[str, ...]:
    """Returns scores, rule, size, sign, and whether pruned, of a stored selection's name."""
    found = re.fullmatch(r"select\.(.+)\.(topn|greedy|threshold)([\d.]+)\.(abs|signed)\.(raw|pruned)", name)
    assert found is not None, name
    return found.groups()
