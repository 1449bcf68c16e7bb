"""Losses of dictionaries and their gradients: against torch's autograd in float64, by hand, and SAELens's goldens."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tljax.dictionaries.training import TrainingConfig, dictionary_loss, gradients, initial_parameters
from tljax.dictionaries.training.coefficients import numbers_of, structure_of
from tljax.dictionaries.training.estimators import jumprelu, step
from tljax.dictionaries.training.gradients import loss_and_gradients
from tljax.dictionaries.training.selection import cut_batch

D, F, TOKENS = 8, 24, 12
GOLDENS = Path(__file__).parents[4] / "shared" / "goldens" / "dictionaries" / "saelens" / "training_losses"

CONFIGS = {
    "standard": {"l1_coefficient": 0.3},
    "standard p=0.5": {"l1_coefficient": 0.3, "lp_norm": 0.5},
    "gated": {"architecture": "gated", "l1_coefficient": 0.3},
    "gated, stopped": {"architecture": "gated", "l1_coefficient": 0.3, "gated_stop_gradient": True},
    "topk": {"architecture": "topk", "k": 3},
    "topk unscaled": {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": False},
    "abstopk": {"architecture": "abstopk", "k": 3, "aux_loss_coefficient": 0.5},
    "batchtopk": {"architecture": "batchtopk", "k": 3},
    "matryoshka": {"architecture": "batchtopk", "k": 3, "matryoshka_widths": (6, 12)},
    "matryoshka aux": {"architecture": "batchtopk", "k": 3, "matryoshka_widths": (6, 12), "matryoshka_aux_loss": True},
    "layer_norm": {"architecture": "topk", "k": 3, "normalize_activations": "layer_norm"},
    "transcoder": {"architecture": "topk", "k": 3, "transcoder": True, "skip": True, "d_out": 6},
    "crosscoder": {"n_sources": 2, "l1_coefficient": 0.3},
    "crosscoder batchtopk": {"n_sources": 2, "architecture": "batchtopk", "k": 3},
}


def _case(name: str) -> tuple[TrainingConfig, dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    cfg = TrainingConfig(**({"d_in": D, "d_sae": F} | CONFIGS[name]))
    rng = np.random.default_rng(sum(map(ord, name)))
    shapes = jax.eval_shape(lambda: initial_parameters(cfg))
    params = {key: rng.normal(size=leaf.shape).astype(np.float32) * 0.5 for key, leaf in shapes.items()}
    x = rng.normal(size=(TOKENS, cfg.width_in)).astype(np.float32)
    y = rng.normal(size=(TOKENS, cfg.width_out)).astype(np.float32) if cfg.transcoder else x
    return cfg, params, x, y, rng.random(F) < 0.4


def _mask(values: torch.Tensor, k: int) -> torch.Tensor:
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(k, dim=-1).indices, True)


def _reference(
    cfg: TrainingConfig, p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, dead: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The terms of the loss as the reference writes them, without a thought for speed."""
    norms = p["W_dec"].reshape(F, cfg.n_sources or 1, -1).norm(dim=-1).sum(dim=-1)
    mean, spread = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
    normal = (x - mean) / (spread + 1e-5) if cfg.normalize_activations == "layer_norm" else x
    undo = (lambda out: out * spread + mean) if cfg.normalize_activations == "layer_norm" else (lambda out: out)
    u = (normal - p["b_dec"] if cfg.subtracts_b_dec else normal) @ p["W_enc"]
    terms = {}
    if cfg.architecture == "gated":
        gate = u + p["b_gate"]
        f = (gate > 0) * torch.relu(u * p["r_mag"].exp() + p["b_mag"])
        stop = (lambda value: value.detach()) if cfg.gated_stop_gradient else (lambda value: value)
        terms["l1_loss"] = 0.3 * (torch.relu(gate) * norms).sum(dim=-1).mean()
        through = torch.relu(gate) @ stop(p["W_dec"]) + stop(p["b_dec"])
        terms["auxiliary_reconstruction_loss"] = (y - through).square().sum(dim=-1).mean()
    else:
        h = u + p["b_enc"]
        scaled = h * norms if cfg.selects_by_norm else h
        f = torch.relu(h)
        if cfg.architecture == "standard":
            terms["l1_loss"] = 0.3 * (f * norms).norm(p=cfg.lp_norm, dim=-1).mean()
        elif cfg.architecture == "topk":
            f = f * _mask(scaled, 3)
        elif cfg.architecture == "abstopk":
            f = h * _mask(scaled.abs(), 3)
        else:
            f = f * _mask(torch.relu(scaled).reshape(-1), 3 * TOKENS).reshape(f.shape)
    outputs = [undo(f[:, :w] @ p["W_dec"][:w] + p["b_dec"]) for w in cfg.matryoshka_widths or (F,)]
    if "W_skip" in p:
        outputs[-1] = outputs[-1] + x @ p["W_skip"].T
    terms["mse_loss"] = (outputs[-1] - y).square().sum(dim=-1).mean()
    for width, output in zip(cfg.matryoshka_widths[:-1], outputs[:-1], strict=True):
        terms[f"inner_mse_loss_{width}"] = (output - y).square().sum(dim=-1).mean()
    if cfg.architecture in ("topk", "abstopk", "batchtopk"):
        levels = list(zip((0, *cfg.matryoshka_widths[:-1]), cfg.matryoshka_widths or (F,), outputs, strict=True))
        levels = levels if cfg.matryoshka_aux_loss else [(0, F, outputs[-1])]
        aux = torch.zeros(())
        for start, end, output in levels:
            number, half = int(dead[start:end].sum()), x.shape[-1] // 2
            if not number:
                continue
            values = scaled[:, start:end].abs() if cfg.architecture == "abstopk" else scaled[:, start:end]
            kept = _mask(torch.where(dead[start:end], values, -torch.inf), min(half, number))
            guess = (h[:, start:end] * kept) @ p["W_dec"][start:end]
            error = (guess - (y - output).detach()).square().sum(dim=-1).mean()
            aux = aux + min(number / half, 1) * error
        terms["auxiliary_reconstruction_loss"] = (0.5 if cfg.architecture == "abstopk" else 1.0) * aux
    return terms


@pytest.mark.parametrize("name", CONFIGS)
def test_terms_and_gradients_are_those_of_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, params, x, y, dead = _case(name)
    leaves = {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in params.items()}
    expected = _reference(cfg, leaves, torch.tensor(x).double(), torch.tensor(y).double(), torch.tensor(dead))
    sum(expected.values()).backward()  # pyright: ignore

    def total(params: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        losses = dictionary_loss(params, jnp.asarray(x), cfg, targets=jnp.asarray(y), dead=jnp.asarray(dead))
        return losses.total, losses

    grads, losses = jax.grad(total, has_aux=True)({key: jnp.asarray(value) for key, value in params.items()})
    assert losses.terms.keys() == expected.keys()
    for term, value in expected.items():
        np.testing.assert_allclose(losses.terms[term], value.detach(), rtol=2e-5)
    monkeypatch.setattr(gradients, "_CHUNK_BYTES", 4 * F * 4)  # four rows at once
    chunked, _ = loss_and_gradients(
        {key: jnp.asarray(value) for key, value in params.items()}, jnp.asarray(x), jnp.asarray(y),
        numbers_of(cfg, 1), jnp.asarray(dead), structure_of(cfg, cfg.k), jnp.float32(0.7),
    )  # fmt: skip
    for key, leaf in leaves.items():
        wanted = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
        scale = max(float(np.abs(wanted).max()), 1e-3)
        np.testing.assert_allclose(grads[key], wanted, atol=1e-5 * scale, err_msg=key)
        np.testing.assert_allclose(chunked[key], wanted, atol=1e-5 * scale, err_msg=f"{key}, chunked")


def test_estimators_are_the_sums_of_rectangles() -> None:
    h = jnp.asarray([[0.50, 0.74, 2.0], [0.76, 1.2, -1.0], [0.26, 0.9, 0.51]])
    threshold, bandwidth = jnp.asarray([0.5, 1.0, 1.0]), jnp.float32(0.5)
    weights = jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    inside = np.asarray([[1, 0, 0], [0, 1, 0], [1, 1, 0]])  # |h - threshold| < 0.25

    def weighted(function: Any, to_input: bool) -> tuple[np.ndarray, np.ndarray]:
        grads = jax.grad(lambda h, t: (function(h, t, bandwidth, to_input) * weights).sum(), argnums=(0, 1))(
            h, threshold
        )
        return np.asarray(grads[0]), np.asarray(grads[1])

    to_h, to_threshold = weighted(step, False)
    np.testing.assert_allclose(to_threshold, -(inside * np.asarray(weights) / 0.5).sum(axis=0))
    assert not to_h.any()
    np.testing.assert_allclose(weighted(step, True)[0], inside * np.asarray(weights) / 0.5)
    to_h, to_threshold = weighted(jumprelu, False)
    np.testing.assert_allclose(to_threshold, -(inside * np.asarray(weights) * [1, 2, 2]).sum(axis=0))
    np.testing.assert_allclose(to_h, np.where(np.asarray(h) > np.asarray(threshold), weights, 0))


@pytest.mark.parametrize("guess", [0.0, 0.8, 1e-6, 1e6])
@pytest.mark.parametrize("kind", ["plain", "ties", "few", "none"])
def test_a_batch_keeps_the_largest_and_the_first_of_equals(kind: str, guess: float) -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(12, 40)).astype(np.float32)
    if kind == "ties":
        values = np.round(values * 2) / 2
    elif kind != "plain":
        values = -np.abs(values)
        values[3, :5] = (0.1, 0.2, 0.3, 1e-30, 7) if kind == "few" else -1
    keep = 37
    cut = jax.jit(lambda v, g: cut_batch(lambda block: block, v, jnp.int32(keep), g))(values, jnp.float32(guess))
    order = np.argsort(-values.reshape(-1), kind="stable")[:keep]
    expected = np.zeros(values.size, bool)
    expected[[place for place in order if values.reshape(-1)[place] > 0]] = True
    np.testing.assert_array_equal(cut.keeps(jnp.asarray(values)).reshape(-1), expected)
    parts = [cut.keeps(jnp.asarray(values[first : first + 4]), first) for first in (0, 4, 8)]
    np.testing.assert_array_equal(np.concatenate(parts).reshape(-1), expected)


@pytest.mark.skipif(not GOLDENS.is_dir(), reason="the shared goldens are not here")
def test_losses_are_saelens() -> None:
    names = (
        "l1_coefficient", "lp_norm", "l0_coefficient", "jumprelu_bandwidth", "jumprelu_tanh_scale", "k",
        "pre_act_loss_coefficient", "jumprelu_ste_to_input", "rescale_acts_by_decoder_norm", "aux_loss_coefficient",
    )  # fmt: skip
    for name, case in json.loads((GOLDENS / "cases.json").read_text()).items():
        stored = json.loads((GOLDENS / name / "cfg.json").read_text())
        weights, io = (load_file(GOLDENS / name / f"{file}.safetensors") for file in ("sae_weights", "io"))
        fields = {key: stored[key] for key in names if key in stored} | {"architecture": stored["architecture"]}
        if widths := stored.get("matryoshka_widths"):
            fields |= {"architecture": "batchtopk", "matryoshka_widths": tuple(widths)}
        if stored.get("jumprelu_sparsity_loss_mode") == "tanh":
            fields["jumprelu_sparsity_loss"] = "tanh"
        cfg = TrainingConfig(d_in=stored["d_in"], d_sae=stored["d_sae"], **fields)
        params = {key: jnp.asarray(value) for key, value in weights.items() if key != "topk_threshold"}
        coefficients = {f"{key}_coefficient": value["value"] for key, value in case["coefficients"].items()}

        def total(params: Any, cfg: TrainingConfig = cfg, io: Any = io, given: Any = coefficients) -> Any:
            losses = dictionary_loss(params, io["x"], cfg, coefficients=given, dead=jnp.asarray(io["dead_mask"], bool))
            return losses.total, losses

        grads, losses = jax.grad(total, has_aux=True)(params)
        assert losses.terms.keys() == case["losses"].keys()
        for term, value in case["losses"].items():
            np.testing.assert_allclose(losses.terms[term], value, rtol=1e-6, err_msg=f"{name} {term}")
        for key, grad in grads.items():
            wanted = io[f"grad.{key}"]
            np.testing.assert_allclose(grad, wanted, atol=1e-6 * np.abs(wanted).max(), err_msg=f"{name} {key}")
        np.testing.assert_allclose(losses.features, io["acts"], atol=1e-5)
        if losses.smallest is not None:
            np.testing.assert_allclose(losses.smallest, case["topk_threshold"]["min_positive"], rtol=1e-6)
