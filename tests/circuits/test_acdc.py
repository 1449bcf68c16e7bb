"""ACDC decides as one evaluation after another would, whatever ran at once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from variants import build

from tljax import Batch, HookedTransformer
from tljax.circuits import ResidualGraph
from tljax.circuits.masked import masked_stream
from tljax.circuits.running import prepare_runs
from tljax.circuits.search.acdc import acdc
from tljax.circuits.writers import writer_outputs, writer_points
from tljax.patching import KL, LogitDiff
from tljax.patching.engine.base_run import run_base
from tljax.text.inputs import prepare

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens" / "circuits" / "gpt2_a"
SOURCE = np.random.default_rng(3).integers(1, 13, (2, 6))
PROMPT = np.where(np.arange(6) == 2, (SOURCE + 4) % 12 + 1, SOURCE)
METRIC = LogitDiff(np.asarray([1, 2]), np.asarray([3, 4]))


def one_after_another(
    model: HookedTransformer, metric: Any, tau: float, sign: int, order: str
) -> tuple[np.ndarray, np.ndarray]:
    """The edges kept and the changes of the metric, from one whole run of one circuit a decision."""
    graph = ResidualGraph.of(model)
    runs = prepare_runs(model, graph, PROMPT, SOURCE)
    measure = runs.measure(metric)

    def value(mask: np.ndarray) -> float:
        return float(np.mean(runs.metrics(mask[None, None, None], measure, progress=False)))

    mask, changes = graph.edges.copy(), np.full(graph.shape, np.nan)
    current = value(mask)
    for reader in reversed(range(graph.n_readers)):
        writers = np.flatnonzero(graph.edges[:, reader])
        for writer in writers[::-1] if order == "reverse" else writers:
            mask[writer, reader] = False
            new = value(mask)
            changes[writer, reader] = new - current
            if sign * (new - current) < tau:
                current = new
            else:
                mask[writer, reader] = True
    return mask, changes


@pytest.mark.parametrize(
    ("kind", "tau", "order"), [("gpt2", 0.01, "reverse"), ("llama", 0.03, "normal"), ("sandwich", 0.05, "reverse")]
)
def test_decides_as_one_evaluation_after_another(kind: str, tau: float, order: Any) -> None:
    model = build(kind)
    mask, changes = one_after_another(model, METRIC, tau, -1, order)
    got = acdc(model, PROMPT, SOURCE, METRIC, tau=tau, by="lowers", order=order, progress=False)
    assert 0 < mask.sum() < got.circuit.graph.n_edges
    np.testing.assert_array_equal(got.circuit.mask, mask)
    np.testing.assert_allclose(got.effect, changes, atol=1e-5)
    final = got.circuit.run(model, PROMPT, SOURCE, metric=METRIC, progress=False)
    np.testing.assert_allclose(got.final, np.mean(final), atol=1e-5)


def test_what_runs_at_once_changes_no_decision_and_the_default_is_divergence() -> None:
    model = build("gpt2")
    got = acdc(model, PROMPT, SOURCE, tau=0.02, progress=False)
    given = acdc(model, PROMPT, SOURCE, KL(model(PROMPT)), tau=0.02, by="raises", max_batch=1, progress=False)
    apart = acdc(model, PROMPT, SOURCE, tau=0.02, batch_size=1, progress=False)
    assert given.runs == given.evaluations <= got.runs
    for other in (given, apart):
        np.testing.assert_array_equal(got.circuit.mask, other.circuit.mask)
    pruned = acdc(model, PROMPT, SOURCE, tau=0.02, prune=True, progress=False)
    np.testing.assert_array_equal(pruned.circuit.mask, got.circuit.prune().mask)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "llama", "moe"])
def test_a_masked_run_may_start_at_a_layer(kind: str) -> None:
    model = build(kind)
    cfg, params, graph = model.cfg, model.params, ResidualGraph.of(model, experts=kind == "moe")
    base, source = (
        run_base(model, prepare(cfg, None, tokens), writer_points(graph)) for tokens in (PROMPT, SOURCE)
    )  # fmt: skip
    own, carried = (writer_outputs(cfg, params, graph, run.activations) for run in (base, source))
    rng = np.random.default_rng(0)
    for start in (1, 2):
        masks = rng.random((3, 1, 1, *graph.shape)) < 0.5
        masks[..., : graph.readers_of(start).start] = True
        below = graph.writers_of(start - 1).stop
        whole = masked_stream(cfg, params, graph, base.tokens, base.context, masks, carried)
        later = masked_stream(
            cfg, params, graph, base.residual(start), base.context, masks, carried, start=start,
            lacking=(carried - own)[:, :, :below],
        )  # fmt: skip
        np.testing.assert_allclose(later[:, :, :6], whole[:, :, :6], atol=2e-5)


@pytest.mark.skipif(not GOLDENS.exists(), reason="the large goldens are not here")
def test_goldens() -> None:
    plain = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model = HookedTransformer.from_pretrained(str(GOLDENS / "model"), **dict.fromkeys(plain, False))
    with np.load(GOLDENS / "data.npz") as data, np.load(GOLDENS / "brute_unprocessed.npz") as brute:
        data, brute = dict(data), {key: brute[key] for key in brute if key.startswith("acdc")}
    said = json.loads((GOLDENS / "brute_unprocessed.json").read_text())["acdc"]
    mask = np.arange(data["clean"].shape[1]) < data["lengths"][:, None]
    clean, corrupt = (Batch.from_mask(data[kind], mask, "right") for kind in ("clean", "corrupt"))
    for name, facts in said.items():
        kind, sign, order, tau = name.removeprefix("acdc.").split(".", 3)
        metric = None if kind == "kl" else LogitDiff(data["answer"], data["wrong"])
        by = "absolute" if sign == "abs" else "raises" if kind == "kl" else "lowers"
        found = acdc(
            model, clean, corrupt, metric, tau=float(tau[3:]), by=by, order=order, progress=False  # type: ignore
        )  # fmt: skip
        np.testing.assert_array_equal(found.circuit.mask, brute[f"{name}.kept"], err_msg=name)
        np.testing.assert_array_equal(found.circuit.prune().mask, brute[f"{name}.kept_pruned"], err_msg=name)
        assert abs(abs(found.final) - abs(facts["final_metric"])) < 1e-4
