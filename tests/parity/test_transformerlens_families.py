"""Every family that TransformerLens 3.9 loads too: its whole cache against tljax's, from golden files.

``tests/golden/make_families.py`` made the files and says how TransformerLens came to read each tiny checkpoint. Here
the same checkpoint is made anew, and tljax reads it unprocessed. :data:`RENAMED` and :data:`ONLY_HERE` are all that
differs.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import hf_models
from fingerprint import fingerprint, same
from safetensors import safe_open

from tljax import ActivationCache, HookedTransformer
from tljax.checkpoints.families import FAMILIES

FOLDER = Path(__file__).parents[1] / "golden" / "families"
READ_BY_TRANSFORMERLENS = """
    ApertusForCausalLM BloomForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoForCausalLM
    GPTNeoXForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM GemmaForCausalLM GptOssForCausalLM LlamaForCausalLM
    MistralForCausalLM MixtralForCausalLM OPTForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM
    OlmoeForCausalLM Phi3ForCausalLM PhiForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM
"""
"""Decoders that its HookedTransformer loads from Hugging Face, SantaCoder under the name of transformers' own class."""
ASKED_FOR = ("hook_result", "hook_mlp_in")
"""Optional points that the files hold too."""
TOLERANCE = 1e-4
"""Of a difference at a point, or of the point's largest magnitude where that is above one."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden file: its record and its tensors, aliases resolved."""

    record: dict[str, Any]
    tensors: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.tensors[self.record["aliases"].get(key, key)]


@functools.cache
def golden(case: str) -> Golden:
    with safe_open(FOLDER / f"{case}.safetensors", framework="numpy") as file:
        record = json.loads(file.metadata()["record"])
        return Golden(record, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
READ_HERE = {family.architecture for family in FAMILIES}
RUNNABLE = [case for case in CASES if golden(case).record["architecture"] in READ_HERE]


@dataclasses.dataclass(frozen=True)
class Renamed:
    """TransformerLens's points whose name or shape is another in tljax.

    Attributes:
        pattern: regular expression that matches TransformerLens's whole name.
        name: tljax's, with the pattern's groups.
        why: the reason.
        reshape: turns tljax's activation into TransformerLens's, given the cache and the match.
        architectures: part of the names of the architectures it holds for.
    """

    pattern: str
    name: str
    why: str
    reshape: Callable[[np.ndarray, ActivationCache, re.Match[str]], np.ndarray] = lambda value, cache, match: value
    architectures: str = ""


def flat(value: np.ndarray, cache: ActivationCache, match: re.Match[str]) -> np.ndarray:
    """All axes but the last as one."""
    return value.reshape(-1, value.shape[-1])


def repeated(value: np.ndarray, cache: ActivationCache, match: re.Match[str]) -> np.ndarray:
    """One key/value head repeated for each query head."""
    block = match[0].split(".attn.")[0]
    return np.repeat(value, cache[f"{block}.attn.hook_q"].shape[2], axis=2)


def of_expert(value: np.ndarray, cache: ActivationCache, match: re.Match[str]) -> np.ndarray:
    """The rows of one expert's tokens, those that chose it first before those that chose it second."""
    indices = np.asarray(cache[f"{match['block']}.mlp.hook_expert_indices"])
    n_choices = indices.shape[-1]
    chosen = indices.reshape(-1, n_choices).T
    choice, token = np.nonzero(chosen == int(match["expert"]))
    return value.reshape(-1, n_choices, value.shape[-1])[token, choice]


Run = tuple[Golden, jax.Array, ActivationCache]
EXPERT = r"(?P<block>blocks\.\d+)\.mlp\.experts\.(?P<expert>\d+)\.hook_"
RAGGED = "an expert's tokens differ in number: here each token has its chosen experts as an axis"
RENAMED = (
    Renamed(r"(blocks\.\d+)\.(ln[12])\.(.+)", r"\1.\2_post.\3", "these norms come after attention and MLP",
            architectures="Olmo2 Olmo3"),
    Renamed(r"(.+\.attn\.[qk]_norm\..+)", r"\1", "batch, position and head keep their axes", flat,
            architectures="Qwen3 Gemma3 Apertus"),
    Renamed(r"(.+\.attn\.hook_[kv])", r"\1", "the one key/value head is there once", repeated,
            architectures="GPTBigCode"),
    Renamed(EXPERT + "gate", r"\g<block>.mlp.experts.hook_pre", RAGGED + "; named as in a gated MLP", of_expert),
    Renamed(EXPERT + "pre", r"\g<block>.mlp.experts.hook_pre_linear", RAGGED + "; named as in a gated MLP", of_expert),
    Renamed(EXPERT + "post", r"\g<block>.mlp.experts.hook_post", RAGGED, of_expert),
    Renamed(r"(.+\.mlp\.hook_expert_(weights|indices))", r"\1", "batch and position keep their axes", flat),
)  # fmt: skip

ONLY_HERE = {
    r"blocks\.\d+\.mlp\.hook_router_scores": "the router's output before its softmax is no point in TransformerLens",
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """One point of TransformerLens's and what tljax has for it, in the same shape."""

    name: str
    expected: np.ndarray
    ours: str
    got: np.ndarray


def renamed(name: str, architecture: str) -> tuple[Renamed, re.Match[str]] | None:
    """The row of the table that a name of TransformerLens's falls under."""
    for row in RENAMED:
        here = not row.architectures or any(part in architecture for part in row.architectures.split())
        if here and (match := re.fullmatch(row.pattern, name)):
            return row, match
    return None


def pairs(file: Golden, cache: ActivationCache) -> Iterator[Pair]:
    """Every point of TransformerLens's cache, in firing order, beside tljax's."""
    for name in file.record["order"]:
        found, expected = renamed(name, file.record["architecture"]), file[f"cache/{name}"]
        ours = name if found is None else found[1].expand(found[0].name)
        assert ours in cache, f"{name} of TransformerLens is not here as {ours}: add it to RENAMED with a reason"
        value = np.asarray(cache[ours])
        yield Pair(name, expected, ours, value if found is None else found[0].reshape(value, cache, found[1]))


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to magnitudes above one; infinite where exactly one is finite."""
    assert got.shape == expected.shape
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(got), finite) or not np.array_equal(got[~finite], expected[~finite]):
        return float("inf")
    difference = np.abs(got[finite].astype(np.float64) - expected[finite]).max(initial=0.0)
    return float(difference) / float(np.abs(expected[finite]).max(initial=1.0))


@pytest.fixture(scope="module", params=[pytest.param(case, marks=pytest.mark.xdist_group(case)) for case in RUNNABLE])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A golden file, and tljax's logits and cache of the checkpoint that it was made of."""
    case, folder = request.param, tmp_path_factory.mktemp(request.param)
    file = golden(case)
    with patch.dict(hf_models.VARIANTS, {case: file.record["checkpoint"]}):
        hf_models.make_hf_model(case, folder)
    if not same(fingerprint(folder), file.record["fingerprint"]):
        pytest.fail(f"{case} has other weights now; make the goldens anew: python tests/golden/make_families.py {case}")
    model = HookedTransformer.from_pretrained_no_processing(folder)
    points = [point.name for point in model.hook_points() if not point.optional or point.name.endswith(ASKED_FOR)]
    logits, cache = model.run_with_cache(file["tokens"], names_filter=points)
    assert list(cache) == points
    return file, logits, cache


def test_every_hook_agrees(
    run: Run, request: pytest.FixtureRequest, support_figures: dict[str, dict[str, Any]]
) -> None:
    """Values and shapes at each of TransformerLens's points, and the logits."""
    file, logits, cache = run
    wrong = {pair.name: (pair.got.shape, pair.expected.shape) for pair in pairs(file, cache)
             if pair.got.shape != pair.expected.shape}  # fmt: skip
    assert not wrong, f"shapes (tljax, TransformerLens): {wrong}"
    errors = {pair.name: error(pair.got, pair.expected) for pair in pairs(file, cache)}
    errors["logits"] = error(np.asarray(logits), file["logits"])
    worst = {name: f"{errors[name]:.1e}" for name in sorted(errors, key=lambda name: -errors[name])[:5]}
    first = next((name for name, value in errors.items() if not value <= TOLERANCE), None)
    assert first is None, f"first above {TOLERANCE:g}: {first}; worst: {worst}"
    figures = {"architecture": file.record["architecture"], "transformerlens": max(errors.values())}
    support_figures[f"transformerlens/{request.node.callspec.id}"] = figures


def test_hooks_fire_in_the_same_order(run: Run) -> None:
    """And what fires here alone, without being asked for, is in the list."""
    file, _, cache = run
    order = list(dict.fromkeys(pair.ours for pair in pairs(file, cache)))
    if file.record["architecture"] == "GptOssForCausalLM":  # here the weights follow from a choice that can be hooked
        swapped = {"hook_expert_weights": "hook_expert_indices", "hook_expert_indices": "hook_expert_weights"}
        parts = [name.rpartition(".") for name in order]
        order = [stage + dot + swapped.get(point, point) for stage, dot, point in parts]
    extra = [name for name in cache if name not in order]
    assert [name for name in cache if name in order] == order
    assert [name for name in extra if not any(re.fullmatch(pattern, name) for pattern in ONLY_HERE)] == []


def test_every_family_of_both_has_a_golden_file() -> None:
    without = READ_HERE & set(READ_BY_TRANSFORMERLENS.split()) - {golden(case).record["architecture"] for case in CASES}
    assert not without, f"give each a line in CASES of tests/golden/make_families.py: {without}"


def test_transformerlens_computes_what_transformers_does() -> None:
    """So that a golden file says what is right. What had to be changed for that is in the maker's ``CORRECTED``."""
    assert CASES
    differences = {case: golden(case).record["logits_minus_transformers"] for case in CASES}
    assert max(differences.values()) < TOLERANCE, differences


def test_every_row_of_the_tables_is_used() -> None:
    names = {(golden(case).record["architecture"], name) for case in CASES for name in golden(case).record["order"]}
    used = {found[0].pattern for architecture, name in names if (found := renamed(name, architecture))}
    assert used == {row.pattern for row in RENAMED}
