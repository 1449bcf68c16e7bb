"""Whole caches, hooks, gradients and weight processing against TransformerLens 3.9, from golden files.

``tests/golden/make_transformerlens.py`` made the files and says what is in them.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from tljax import Replace, Scale, Zero
from tljax.checkpoints.layout import flatten
from tljax.config import HookedTransformerConfig
from tljax.model.hooked_transformer import HookedTransformer
from tljax.weights.processing import process_weights

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4
TOKENS_SHAPE = (2, 7)
CASES = sorted(path.stem.removeprefix("transformerlens_") for path in GOLDEN.glob("transformerlens_*.safetensors"))
OPTIONAL_LEAVES = {
    "hook_tokens", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_result",
    "hook_mlp_in", "hook_in", "hook_router_scores", "hook_expert_result",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden file: its record and its tensors, aliases resolved."""

    record: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.tensors[self.record["aliases"].get(key, key)]

    def run(self, name: str) -> dict[str, np.ndarray]:
        """Hook name to activation, in TransformerLens's firing order."""
        order = self.record["runs"][name]["order"]
        values = {hook: unflattened(hook, self[f"{name}/{hook}"]) for hook in order}
        return {ours: value for hook in order for ours, value in of_experts(hook, values)}

    @property
    def cfg(self) -> HookedTransformerConfig:
        return HookedTransformerConfig.from_dict(self.record["config"])

    def params(self, group: str = "params") -> dict[str, Any]:
        """The parameters in tljax's layout."""
        names = self.record["params"] if group == "params" else self.record["runs"]["processed"]["params"]
        return stored_layout({name: self[f"{group}/{name}"] for name in names}, self.cfg.n_layers)

    def model(self, **changes: Any) -> HookedTransformer:
        return HookedTransformer(self.cfg.replace(**changes), params=self.params())


@functools.cache
def golden(case: str) -> Golden:
    with safe_open(GOLDEN / f"transformerlens_{case}.safetensors", framework="numpy") as file:
        record = json.loads(file.metadata()["record"])
        return Golden(record, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def runs(kind: str, optional_only: bool = False) -> list[Any]:
    """Every (case, run) of a kind, as pytest parameters; or only those that switch optional points on."""
    return [
        pytest.param(case, name, id=f"{case}-{name}")
        for case in CASES
        for name, run in golden(case).record["runs"].items()
        if run["kind"] == kind and (run.get("switches") or not optional_only)
    ]


def unflattened(name: str, value: np.ndarray) -> np.ndarray:
    """Norms of queries and keys, which TransformerLens flattens to ``[batch * pos * head, …]``, with their axes."""
    is_qk_norm = ".q_norm." in name or ".k_norm." in name
    return value.reshape(*TOKENS_SHAPE, -1, value.shape[-1]) if is_qk_norm else value


def of_experts(name: str, values: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """What tljax has for a point: experts' activations by token and choice, all experts' at the place of the first's.

    TransformerLens flattens batch and position, and gives each expert's activations apart, for the tokens that chose
    it: those that did so as their first choice, then the others, in the order of the tokens.
    """
    match = re.fullmatch(r"(.*\.mlp\.)(experts\.(\d+)\.)?(\w+)", name)
    if match is None or f"{match[1]}hook_expert_indices" not in values:
        yield name, values[name]
    elif match[2] is None:
        yield name, values[name].reshape(*TOKENS_SHAPE, -1)
    elif match[3] == "0":
        indices = values[f"{match[1]}hook_expert_indices"]
        out = np.full((*indices.shape, values[name].shape[-1]), np.nan, np.float32)
        for expert in range(indices.max() + 1):
            choice, token = np.nonzero(np.equal(indices.T, expert))
            out[token, choice] = values[f"{match[1]}experts.{expert}.{match[4]}"]
        ours = {"hook_gate": "hook_pre", "hook_pre": "hook_pre_linear", "hook_post": "hook_post"}[match[4]]
        yield f"{match[1]}experts.{ours}", out.reshape(*TOKENS_SHAPE, *out.shape[1:])


def also_there(names: Iterable[str]) -> list[str]:
    """Names of points that TransformerLens has too: it has none for a router's scores."""
    return [name for name in names if not name.endswith("hook_router_scores")]


def stored_layout(state: Mapping[str, np.ndarray], n_layers: int) -> dict[str, Any]:
    """Turns TransformerLens's names and shapes into tljax's parameter tree.

    Attention weights move from ``[n_heads, d_model, d_head]`` to ``[d_model, n_heads, d_head]``; grouped key
    and value weights lose their underscore. Experts' matrices are stacked, and contracted along their first axis.
    """
    state = stacked_experts(state)
    tree: dict[str, Any] = {"blocks": tuple({} for _ in range(n_layers))}
    for name, value in state.items():
        *path, leaf = name.split(".")
        leaf = leaf.lstrip("_")
        value = np.swapaxes(value, 0, 1) if leaf in ("W_Q", "W_K", "W_V") else value
        node: Any = tree
        for part in path:
            node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
        node[leaf] = jnp.asarray(value)
    return tree


def stacked_experts(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters with each layer's experts ``[expert, in, out]`` together, and the router under its own name."""
    stacked: dict[str, Any] = {}
    for name, value in state.items():
        if name.endswith("mlp.W_gate.weight"):
            stacked[name.replace("W_gate.weight", "W_router")] = value.T
        elif match := re.fullmatch(r"(.*\.experts\.)\d+\.(\w+)\.weight", name):
            stacked.setdefault(match[1] + match[2], []).append(value.T)
        else:
            stacked[name] = value
    return {name: np.stack(value) if isinstance(value, list) else value for name, value in stacked.items()}


def assert_close(got: Mapping[str, Any], expected: Mapping[str, np.ndarray], relative: bool = False) -> None:
    """Asserts equal names, shapes and values; the message lists the worst names.

    Args:
        got: what tljax computed.
        expected: what TransformerLens computed; other names in ``got`` are ignored.
        relative: measure against each tensor's largest magnitude instead of absolutely.
    """
    missing = [name for name in expected if name not in got]
    assert not missing, f"not there: {missing}"
    shapes = {name: (np.shape(got[name]), value.shape) for name, value in expected.items()}
    wrong = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    assert not wrong, f"shapes (tljax, TransformerLens): {wrong}"
    errors = {name: error(np.asarray(got[name]), value, relative) for name, value in expected.items()}
    worst = sorted(errors, key=lambda name: -errors[name])[:5]
    report = {name: f"{errors[name]:.1e}" for name in worst}
    first = next((name for name in expected if not errors[name] <= TOLERANCE), None)
    assert first is None, f"first above {TOLERANCE:g}: {first}; worst: {report}"


def error(got: np.ndarray, expected: np.ndarray, relative: bool) -> float:
    """Largest difference; infinite where one is finite and the other is not."""
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(got), finite) or not np.array_equal(got[~finite], expected[~finite]):
        return float("inf")
    difference = np.abs(got[finite].astype(np.float64) - expected[finite]).max(initial=0.0)
    scale = max(float(np.abs(expected[finite]).max(initial=0.0)), 1e-8) if relative else 1.0
    return float(difference) / scale


def outputs(both: Any) -> dict[str, Any]:
    logits, loss = both
    return {"logits": logits, "loss": loss}


def expected_outputs(case: Golden, run: str) -> dict[str, np.ndarray]:
    return {"logits": case[f"{run}:logits"], "loss": case[f"{run}:loss"]}


@pytest.mark.parametrize(("case", "run"), runs("forward"))
def test_every_hook_agrees(case: str, run: str) -> None:
    """Logits, loss, the order in which hooks fire, their shapes and their values."""
    file = golden(case)
    model = file.model(**file.record["runs"][run]["switches"])
    both, cache = model.run_with_cache(file["tokens"], return_type="both")
    expected = file.run(run)
    assert also_there(cache) == list(expected)
    assert_close({**cache, **outputs(both)}, {**expected, **expected_outputs(file, run)})


@pytest.mark.parametrize(("case", "run"), runs("forward"))
def test_the_hook_table_agrees(case: str, run: str) -> None:
    """``hook_points()`` lists what fires, in order, with its shape; what it lists beyond that is optional."""
    file = golden(case)
    model = file.model(**file.record["runs"][run]["switches"])
    expected = {name: value.shape for name, value in file.run(run).items()}
    batch, pos = file["tokens"].shape
    table = {point.name: point.shape(batch, pos) for point in model.hook_points()}
    assert [name for name in table if name in expected] == list(expected)
    assert {name: table[name] for name in expected} == expected
    extra = [name for name in table if name not in expected]
    assert [name for name in extra if name.rsplit(".", 1)[-1] not in OPTIONAL_LEAVES] == []


@pytest.mark.parametrize(("case", "run"), runs("forward", optional_only=True))
def test_optional_points_need_only_be_named(case: str, run: str) -> None:
    """Naming a point captures it without any ``use_…`` switch."""
    file = golden(case)
    base, expected = file.run("base"), file.run(run)
    optional = {name: value for name, value in expected.items() if name not in base}
    assert optional
    _, cache = file.model().run_with_cache(file["tokens"], names_filter=list(optional))
    assert list(cache.keys()) == list(optional)
    assert_close(cache, optional)


@pytest.mark.parametrize(("case", "run"), runs("processed"))
def test_processed_weights_give_the_same_cache(case: str, run: str) -> None:
    """Fold and centre as TransformerLens does, then compare parameters, logits and every hook."""
    file = golden(case)
    record = file.record["runs"][run]
    params, cfg = process_weights(file.params(), file.cfg, **record["flags"])
    assert cfg.normalization_type == record["normalization_type"]
    if record["params"]:
        expected_params = flatten(file.params("processed:params"))
        assert set(flatten(params)) == set(expected_params)
        assert_close(flatten(params), expected_params)
    both, cache = HookedTransformer(cfg, params=params).run_with_cache(file["tokens"], return_type="both")
    expected = file.run(run)
    assert also_there(cache) == list(expected)
    assert_close({**cache, **outputs(both)}, {**expected, **expected_outputs(file, run)})


@pytest.mark.parametrize(("case", "run"), runs("gradients"))
def test_gradients_at_every_hook(case: str, run: str) -> None:
    """``incl_bwd`` adds the gradient of the loss at each point, as ``<name>_grad``, last point first.

    At ln1's points the golden gradient is the whole one; TransformerLens's cache keeps one part in three.
    """
    file = golden(case)
    loss, cache = file.model().run_with_cache(file["tokens"], return_type="loss", incl_bwd=True)
    expected = file.run(run)
    assert list(cache.keys()) == [*file.run("base"), *expected]
    assert_close({**cache, "loss": loss}, {**file.run("base"), "loss": file["base:loss"]})
    assert_close(cache, expected, relative=True)


@pytest.mark.parametrize(("case", "run"), runs("padded"))
def test_padding(case: str, run: str) -> None:
    """A padded row under an explicit attention mask: positions, pattern, loss, all hooks of all rows."""
    file = golden(case)
    tokens, mask = file[f"{run}:tokens"], file[f"{run}:attention_mask"]
    both, cache = file.model().run_with_cache(tokens, attention_mask=mask, return_type="both")
    expected = file.run(run)
    assert also_there(cache) == list(expected)
    assert_close({**cache, **outputs(both)}, {**expected, **expected_outputs(file, run)})


def python_hook(edit: Mapping[str, Any], value: np.ndarray | None) -> Callable[..., Any]:
    """The edit as a plain Python function, the way a TransformerLens user writes it."""

    def function(activation: jax.Array, hook: Any) -> jax.Array:
        where = ... if edit["axis"] is None else (slice(None),) * edit["axis"] + (edit["index"],)
        if edit["op"] == "scale":
            return activation.at[where].multiply(edit["factor"])
        return activation.at[where].set(0.0 if edit["op"] == "zero" else value)

    return function


def intervention(edit: Mapping[str, Any], value: np.ndarray | None, axes: Iterable[str]) -> Any:
    """The edit as one of tljax's compiled interventions."""
    where = {} if edit["axis"] is None else {tuple(axes)[edit["axis"]]: edit["index"]}
    if edit["op"] == "zero":
        return Zero(**where)
    return Scale(edit["factor"], **where) if edit["op"] == "scale" else Replace(jnp.asarray(value), **where)


@pytest.mark.parametrize("compiled", [False, True], ids=["python", "compiled"])
@pytest.mark.parametrize(("case", "run"), runs("hooked"))
def test_hooked_runs(case: str, run: str, compiled: bool) -> None:
    """The same edits through plain functions and through interventions; the cache shows the edited values."""
    file, model = golden(case), golden(case).model()
    axes = {point.name: point.axes for point in model.hook_points()}
    hooks = []
    for number, edit in enumerate(file.record["runs"][run]["edits"]):
        value = file[f"{run}:value{number}"] if edit["op"] == "set" else None
        made = intervention(edit, value, axes[edit["hook"]]) if compiled else python_hook(edit, value)
        hooks.append((edit["hook"], made))
    logits = model.run_with_hooks(file["tokens"], fwd_hooks=hooks)
    with model.hooks(fwd_hooks=hooks) as hooked:
        again, cache = hooked.run_with_cache(file["tokens"], names_filter=list(file.run(run)))
    expected = {**file.run(run), "logits": file[f"{run}:logits"]}
    assert_close({**cache, "logits": logits}, expected)
    assert_close({"logits": again}, {"logits": expected["logits"]})
