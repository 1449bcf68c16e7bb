"""Every method of ``ActivationCache`` against TransformerLens 3.9's, from a golden file.

``tests/golden/make_cache.py`` made the file and says what is in it.
"""

import functools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from test_transformerlens import GOLDEN, golden, stored_layout

from tljax import ActivationCache, HookedTransformer, HookedTransformerConfig
from tljax.weights.processing import process_weights

TOLERANCE = 1e-4
CASES, FORMS = ("gpt2", "llama", "gemma2"), ("raw", "folded")


@functools.cache
def goldens() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with safe_open(GOLDEN / "cache_transformerlens.safetensors", framework="numpy") as file:
        return json.loads(file.metadata()["record"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


RECORD, TENSORS = goldens()


def raw_model(case: str) -> HookedTransformer:
    if case != "gemma2":
        return golden(case).model()
    cfg = HookedTransformerConfig.from_dict(RECORD["gemma2"])
    shapes = stored_layout({name: TENSORS.get(f"gemma2:params/{name}", np.zeros(())) for name in RECORD["params"]}, 2)
    like = HookedTransformer(cfg).params
    return HookedTransformer(cfg, params=fill(shapes, like))


def fill(given: Any, like: Any) -> Any:
    """Parameters of the shapes of ``like``: zeros where the file, which leaves them out, has none."""
    if isinstance(like, dict):
        return {name: fill(given[name], value) for name, value in like.items()}
    if isinstance(like, tuple | list):
        return tuple(fill(a, b) for a, b in zip(given, like, strict=True))
    return given if given.shape == like.shape else jnp.zeros_like(like)


@pytest.fixture(scope="module", params=[f"{case}-{form}" for case in CASES for form in FORMS])
def cache(request: pytest.FixtureRequest) -> tuple[str, str, ActivationCache]:
    case, form = request.param.split("-")
    model = raw_model(case)
    if form == "folded":
        params, cfg = process_weights(model.params, model.cfg)
        assert "fold_ln" in cfg.weight_processing
        model = model.replace(params=params, cfg=cfg)
    return case, form, model.run_with_cache(TENSORS["input"])[1]


def argument(value: Any, case: str, form: str) -> Any:
    if not isinstance(value, str) or value[0] not in "@=":
        return value
    return TENSORS[value[1:]] if value[0] == "@" else jnp.asarray(TENSORS[f"{case}/{form}/{value[1:]}"])


def test_every_method_gives_what_transformerlens_gives(cache: tuple[str, str, ActivationCache]) -> None:
    case, form, activations = cache
    called = set()
    for number, (method, arguments) in enumerate(RECORD["calls"]):
        values = {name: argument(value, case, form) for name, value in arguments.items()}
        if method == "logit_attrs":
            values["final_norm_weight"] = False
        labels = RECORD["labels"].get(f"{case}/{number}")
        result = getattr(activations, method)(**values, **({"return_labels": True} if labels else {}))
        result, got_labels = result if labels else (result, None)
        assert got_labels == labels, (method, arguments)
        expected = TENSORS[f"{case}/{form}/{number}"]
        assert result.shape == expected.shape, (method, arguments)
        np.testing.assert_allclose(result, expected, atol=TOLERANCE, rtol=TOLERANCE, err_msg=f"{method} {arguments}")
        called.add(method)
    assert len(called) == 9
    for layer in range(activations.cfg.n_layers) if case != "gemma2" else ():
        heads = TENSORS[f"{case}/{form}/9"].reshape(-1, *activations["embed"].shape)[4 * layer : 4 * layer + 4]
        results = activations.compute_head_results()["result", layer]
        np.testing.assert_allclose(np.moveaxis(results, 2, 0), heads, atol=TOLERANCE)


def test_logit_attributions_are_transformerlens_s_where_the_final_norm_is_folded(
    cache: tuple[str, str, ActivationCache],
) -> None:
    case, form, activations = cache
    stack = jnp.asarray(TENSORS[f"{case}/{form}/2"])
    exact, without = (activations.logit_attrs(stack, 3, final_norm_weight=weight) for weight in (True, False))
    assert np.allclose(exact, without, atol=1e-6) == (form == "folded")
