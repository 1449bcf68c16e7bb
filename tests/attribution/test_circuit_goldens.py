"""Node scores against TransformerLens 4.3, EAP-IG and a float64 brute force, where their numbers lie here."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tljax import HookedTransformer
from tljax.attribution import AtPStar
from tljax.patching import LogitDiff, sweep

FOLDER = Path(__file__).parents[3] / "shared" / "goldens" / "circuits"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the golden numbers of circuits are not here")


@functools.cache
def model(tag: str) -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing(str(FOLDER / tag / "model"))


@functools.cache
def arrays(path: str) -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / path))


def prompts(tag: str) -> tuple[np.ndarray, np.ndarray, LogitDiff]:
    data = arrays(f"{tag}/data.npz")
    clean, corrupted, answer, wrong = (data[name].astype(np.int32) for name in ("clean", "corrupt", "answer", "wrong"))
    return clean, corrupted, LogitDiff(answer, wrong)


def nodes(tag: str, base: Any, source: Any, metric: Any, pos: tuple[str, ...] = (), **options: Any) -> np.ndarray:
    """Effects of the graph's writers in its order, ``[writer, (pos,) prompt]``."""

    def effect(name: str, axes: tuple[str, ...]) -> np.ndarray:
        return np.asarray(sweep(model(tag), base, source, metric, name, axes, reduce="none", **options).effect())

    z, mlp = effect("z", ("head", *pos)), effect("mlp_out", pos)
    layers = [part for heads, own in zip(z, mlp, strict=True) for part in (heads, own[None])]
    return np.concatenate([effect("embed", pos)[None], *layers])


def close(found: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * np.abs(right).max())


@pytest.mark.parametrize("tag", ["gpt2_a", "llama_b"])
def test_nodes_are_the_brute_force(tag: str) -> None:
    """The brute force scores the loss, which is minus the metric."""
    right = arrays(f"{tag}/brute_unprocessed.npz")["node.EAP.per_example"]
    close(-nodes(tag, *prompts(tag), method="attribution").T, right)


def test_nodes_are_transformer_lens_4() -> None:
    """Theirs: gradient at the corrupted run, times clean - corrupted: a sweep of the corrupted run."""
    clean, corrupted, _ = prompts("gpt2_a")
    theirs, told = arrays("gpt2_a/tl43.npz"), json.loads((FOLDER / "gpt2_a" / "tl43.json").read_text())
    metric = LogitDiff(*(told["batch_metric"][name] for name in ("answer", "wrong")))
    found = nodes("gpt2_a", corrupted, clean, metric, ("pos",), method="attribution").mean(-1)
    heads = model("gpt2_a").cfg.n_heads
    first = {"embed": lambda layer, head: 0, "attn_head_out": lambda layer, head: 1 + layer * (heads + 1) + head,
             "mlp_out": lambda layer, head: 1 + layer * (heads + 1) + heads}  # fmt: skip
    keys = [(first[told["node_kinds"][kind]](layer, head), pos) for kind, layer, head, pos in
            theirs["batch.node.node_keys"]]  # fmt: skip
    close(np.asarray([found[key] for key in keys]), theirs["batch.node.node_scores"])


@pytest.mark.parametrize(("method", "options"), [
    ("EAP", {"method": "attribution"}),
    ("EAP-IG-inputs.steps5", {"method": "ig", "along": "inputs", "steps": 5, "grid": "left"}),
    ("EAP-IG-activations.steps5", {"method": "ig", "along": "writers", "steps": 5, "grid": "left"}),
])  # fmt: skip
@pytest.mark.parametrize("tag", ["gpt2_a", "llama_b"])
def test_nodes_are_eap_ig(tag: str, method: str, options: Any) -> None:
    """Theirs: of the loss, divided by the batch twice, and an MLP's change times the gradient at its input."""
    clean, corrupted, metric = prompts(tag)
    theirs = arrays(f"{tag}/eapig_unprocessed.npz")[f"node.{method}"]
    found = -nodes(tag, clean, corrupted, metric, **options).mean(-1) / len(clean)
    names = ["hook_embed", *(f"blocks.{layer}.{point}" for layer in range(model(tag).cfg.n_layers)
                             for point in ("hook_mlp_in", "hook_mlp_out", "attn.hook_z"))]  # fmt: skip
    kept, source = (model(tag).run_with_cache(tokens, names_filter=names)[1] for tokens in (clean, corrupted))
    quirk = dict(source.items())
    for layer in range(model(tag).cfg.n_layers):
        change = source["mlp_out", layer] - kept["mlp_out", layer]
        quirk[f"blocks.{layer}.hook_mlp_in"] = kept[f"blocks.{layer}.hook_mlp_in"] + change
    mlps = sweep(model(tag), clean, quirk, metric, "mlp_in", (), **options)
    heads = model(tag).cfg.n_heads
    found[heads + 1 :: heads + 1] = -np.asarray(mlps.effect()) / len(clean)
    assert np.abs(found).max() > 0.1 * np.abs(theirs[: len(found)]).max()
    close(found, theirs[: len(found)])


@pytest.mark.parametrize("letter", ["q", "k"])
def test_queries_and_keys_are_the_brute_force(letter: str) -> None:
    right = arrays("gpt2_a/brute_unprocessed.npz")
    for name, rule in (("plain", None), ("fix", AtPStar(grad_drop=False))):
        found = sweep(
            model("gpt2_a"), *prompts("gpt2_a"), letter, ("head", "pos"), reduce="none", method="attribution", rule=rule
        ).effect()  # fmt: skip
        close(np.moveaxis(np.asarray(found), -1, 0), right[f"atpstar.{letter}_{name}"])


def test_dropped_gradients_are_the_brute_force() -> None:
    right = np.abs(arrays("gpt2_a/brute_unprocessed.npz")["atpstar.node_graddrop"]).sum(axis=0) / 2
    found = nodes("gpt2_a", *prompts("gpt2_a"), ("pos",), method="attribution", rule="atp*")
    close(np.moveaxis(found, -1, 0), right)
