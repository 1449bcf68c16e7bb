"""Tiny dictionaries in the layouts that other projects publish, written on the spot, and pieces of their formulas."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import yaml
from safetensors.numpy import save_file

Arrays = dict[str, np.ndarray]


def parameters(d: int, f: int, seed: int = 0, dtype: Any = np.float32) -> Arrays:
    """Random parameters in SAELens's orientation; all of them distinct, thresholds positive."""
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (d, f), "W_dec": (f, d), "b_enc": (f,), "b_dec": (d,), "W_skip": (d, d), "r_mag": (f,)}
    drawn = {name: rng.normal(size=shape) * 0.4 for name, shape in shapes.items()}
    drawn |= {
        "threshold": rng.uniform(0.1, 0.6, f),
        "b_gate": rng.normal(size=f) * 0.2,
        "b_mag": rng.normal(size=f) * 0.2,
    }
    return {name: array.astype(dtype) for name, array in drawn.items()}


def inputs(d: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(5, d)).astype(np.float32)


def wide(params: Mapping[str, np.ndarray]) -> Arrays:
    return {name: np.asarray(array, np.float64) for name, array in params.items()}


def relu(h: np.ndarray) -> np.ndarray:
    return np.maximum(h, 0)


def top_k(values: np.ndarray, k: int) -> np.ndarray:
    """A mask of the k largest along the last axis."""
    mask = np.zeros(values.shape, bool)
    np.put_along_axis(mask, np.argsort(-values, axis=-1)[..., :k], True, axis=-1)
    return mask


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_yaml(path: Path, content: Any) -> None:
    path.write_text(yaml.safe_dump(content))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: as_torch(value) for name, value in content.items()}, path)


def as_torch(value: Any) -> Any:
    """An array as a tensor; anything else as it is."""
    if isinstance(value, Mapping):
        return {name: as_torch(entry) for name, entry in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == ml_dtypes.bfloat16:
        return torch.tensor(value.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(value)


def linear(p: Arrays, **names: str) -> Arrays:
    """Arrays as torch's Linear layers hold them, with biases under the given names."""
    weights = {"encoder.weight": p["W_enc"].T, "decoder.weight": p["W_dec"].T}
    return weights | {name: p[own] for own, name in names.items()}


def dictionary_learning(path: Path, p: Arrays, kind: str, **more: Any) -> Path:
    """Writes ``ae.pt`` and ``config.json`` of a class; ``more`` joins the state dict."""
    d, f = p["W_enc"].shape
    plain = {name: p[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    state: dict[str, Any] = {
        "AutoEncoder": linear(p, b_enc="encoder.bias", b_dec="bias"),
        "AutoEncoderNew": linear(p, b_enc="encoder.bias", b_dec="decoder.bias"),
        "AutoEncoderTopK": linear(p, b_enc="encoder.bias", b_dec="b_dec"),
        "BatchTopKSAE": linear(p, b_enc="encoder.bias", b_dec="b_dec"),
        "GatedAutoEncoder": linear(p, b_dec="decoder_bias", b_gate="gate_bias", b_mag="mag_bias", r_mag="r_mag"),
        "JumpReluAutoEncoder": plain | {"threshold": p["threshold"]},
        "MatryoshkaBatchTopKSAE": plain,
    }[kind]
    write_pickle(path / "ae.pt", state | more)
    trainer = {"dict_class": kind, "activation_dim": d, "dict_size": f, "layer": 2, "lm_name": "gpt2"}
    write_json(path / "config.json", {"trainer": trainer | {"submodule_name": "mlp_out_layer_2"}, "buffer": {}})
    return path


def sparsify(path: Path, p: Arrays, **changes: Any) -> Path:
    d = p["b_dec"].shape[0]
    arrays = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    if changes.get("skip_connection"):
        arrays["W_skip"] = p["W_skip"]
    write_arrays(path / "sae.safetensors", arrays)
    config = {"expansion_factor": len(p["b_enc"]) // d, "normalize_decoder": True, "num_latents": 0, "k": 3, "d_in": d}
    write_json(path / "cfg.json", config | changes)
    return path


def gemma_scope(path: Path, p: Arrays, **names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    arrays = {name: p[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    np.savez(path / "params.npz", **{names.get(name, name): array for name, array in arrays.items()})
    return path


def gemma_scope_2(path: Path, p: Arrays, reads: str, writes: str, *, affine: bool = False, **changes: Any) -> Path:
    arrays = {name.lower(): p[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if affine:
        arrays["affine_skip_connection"] = p["W_skip"].T
    write_arrays(path / "params.safetensors", arrays)
    points = {"hf_hook_point_in": f"model.layers.{reads}", "hf_hook_point_out": f"model.layers.{writes}"}
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-270m-pt", "width": len(p["b_enc"]), "l0": 12}
    write_json(path / "config.json", config | points | {"affine_connection": affine} | changes)
    return path


def openai(path: Path, p: Arrays, **changes: Any) -> Path:
    f = len(p["b_enc"])
    state: dict[str, Any] = linear(p, b_enc="latent_bias", b_dec="pre_bias")
    state |= {"stats_last_nonzero": np.zeros(f, np.int64), "latents_mean_square": np.zeros(f, np.float32)}
    state |= {"latents_activation_frequency": np.linspace(0.01, 0.1, f, dtype=np.float32)}
    state |= {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "ReLU"}}
    write_pickle(path, state | changes)
    return path


def llama_scope(path: Path, p: Arrays, **changes: Any) -> Path:
    d, f = p["W_enc"].shape
    write_arrays(path / "checkpoints" / "final.safetensors", linear(p, b_enc="encoder.bias", b_dec="decoder.bias"))
    config = {"hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post"}
    config |= {"d_model": d, "d_sae": f, "jump_relu_threshold": 0.3, "act_fn": "jumprelu"}
    config |= {"norm_activation": "dataset-wise", "dataset_average_activation_norm": {"in": 7.3, "out": 7.3}}
    write_json(path / "hyperparams.json", config | changes)
    return path


def llamascopium(path: Path, p: Arrays, names: str, **changes: Any) -> Path:
    """The later vintages: ``names`` is ``"linear"`` (R1-Distill) or ``"native"``."""
    if names == "linear":
        arrays = linear(p, b_enc="encoder.bias", b_dec="decoder.bias")
        arrays["log_jumprelu_threshold"] = np.log(p["threshold"].astype(np.float32))
    else:
        arrays = {"W_E": p["W_enc"], "b_E": p["b_enc"], "W_D": p["W_dec"], "b_D": p["b_dec"]}
        arrays["activation_function.log_jumprelu_threshold"] = np.log(p["threshold"].astype(np.float32))
    arrays["dataset_average_activation_norm.blocks.3.hook_resid_mid"] = np.array(5.0, np.float32)
    arrays["dataset_average_activation_norm.blocks.3.hook_mlp_out"] = np.array(2.0, np.float32)
    write_arrays(path / "sae_weights.safetensors", arrays)
    config = {"sae_type": "sae", "hook_point_in": "blocks.3.hook_resid_mid", "hook_point_out": "blocks.3.hook_mlp_out"}
    config |= {"d_model": p["W_enc"].shape[0], "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    write_json(path / "config.json", config | {"sparsity_include_decoder_norm": True} | changes)
    return path


def circuit_tracer(path: Path, layers: list[Arrays], *, old: bool = False, skip: bool = True, **changes: Any) -> Path:
    names = [f"layer_{number}.safetensors" for number in range(len(layers))]
    for name, p in zip(names, layers, strict=True):
        arrays = {
            "W_enc": p["W_enc"].T,
            "W_dec": p["W_dec"].T if old else p["W_dec"],
            "b_enc": p["b_enc"],
            "b_dec": p["b_dec"],
        }
        arrays |= {"W_skip": p["W_skip"]} if skip else {}
        write_arrays(path / name, arrays | {"activation_function.threshold": p["threshold"]})
    config = {"model_name": "gpt2", "model_kind": "transcoder_set", "transcoders": names}
    config |= {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    write_yaml(path / "config.yaml", config | changes)
    return path


def crosscoder_parameters(n: int, d: int, f: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (n, d, f), "W_dec": (f, n, d), "b_enc": (f,), "b_dec": (n, d)}
    return {name: (rng.normal(size=shape) * 0.4).astype(np.float32) for name, shape in shapes.items()}


def crosscoder_nc(path: Path, p: Arrays, **changes: Any) -> Path:
    write_pickle(path / "25.pt", p)
    config = {"dict_size": len(p["b_enc"]), "model_name": "gpt2-small", "site": "resid_post", "seed": 51}
    write_json(path / "25_cfg.json", config | changes)
    return path


def crosscoder_sf(path: Path, p: Arrays, prefix: str = "", **more: Any) -> Path:
    """Writes ``model.safetensors`` and ``config.json``; ``more`` are buffers."""
    n, d, f = p["W_enc"].shape
    arrays = {"encoder.weight": p["W_enc"], "encoder.bias": p["b_enc"], "decoder.bias": p["b_dec"]}
    arrays["decoder.weight"] = np.swapaxes(p["W_dec"], 0, 1)
    nan = np.full((n, d), np.nan, np.float32)
    arrays |= {"activation_mean": nan, "activation_std": nan} | more
    write_arrays(path / "model.safetensors", {prefix + name: np.asarray(array) for name, array in arrays.items()})
    write_json(
        path / "config.json", {"activation_dim": d, "dict_size": f, "num_layers": n, "code_normalization_alpha_cc": 0.2}
    )
    return path


Computes = Callable[[Arrays, np.ndarray], np.ndarray]
"""Features of parameters and inputs, in float64."""
