"""Files of dictionaries by other projects that are damaged, mixed up, of another kind, or that would run code."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files as files
import numpy as np
import torch
from safetensors.numpy import load_file
from table import Case, World

from tljax.dictionaries import Crosscoder, CrossLayerTranscoder, Dictionary, load_transcoders, save_transcoders
from tljax.dictionaries.formats.table import detected
from tljax.dictionaries.maths.config import DictionaryConfig
from tljax.errors import DictionaryError

P = files.parameters(6, 12)
CROSS = files.crosscoder_parameters(2, 3, 5)
RESIDUAL = ("5.output", "5.output")
K = np.array(3, np.int32)


def folder(name: str = "dictionary") -> Path:
    return Path(tempfile.mkdtemp()) / name


def load(path: Path, **facts: Any) -> Dictionary:
    (row,) = detected(path)
    found = row.reads(path, **facts)
    assert isinstance(found.params, dict)
    assert isinstance(found.cfg, DictionaryConfig)
    return Dictionary(found.params, found.cfg)


def cut(path: Path, file: str) -> Path:
    """The directory with a file cut in half."""
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    return path


def rewritten(path: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The directory with the contents of a JSON or safetensors file changed."""
    if file.endswith(".json"):
        content = json.loads((path / file).read_text())
        change(content)
        (path / file).write_text(json.dumps(content))
    else:
        arrays = load_file(path / file)
        change(arrays)
        files.write_arrays(path / file, arrays)
    return path


def with_nan() -> dict[str, np.ndarray]:
    bad = P["W_dec"].copy()
    bad[2, 3] = np.nan
    return P | {"W_dec": bad}


def learned(kind: str = "AutoEncoder", p: Any = P, **more: Any) -> Path:
    return files.dictionary_learning(folder(), p, kind, **more)


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('a pickle ran code')",))


def evil() -> Path:
    path = learned()
    torch.save({"encoder.weight": Evil()}, path / "ae.pt")
    return path


def objects() -> Path:
    path = files.gemma_scope(folder(), P)
    np.savez(path / "params.npz", W_enc=np.array([{}], object), allow_pickle=True)
    return path


def sets(layers: int = 2, p: Any = P, **changes: Any) -> Path:
    return files.circuit_tracer(folder(), [p] * layers, **changes)


def one_transcoder(**changes: Any) -> Dictionary:
    loaded = load_transcoders(sets(1, skip=False))[0]
    params = {name: array for name, array in loaded.params.items() if name != "threshold" or not changes}
    return Dictionary(params, loaded.cfg.replace(**changes))


def backwards() -> Path:
    path = folder()
    for n in (0, 1):
        arrays = {name.lower(): P[name] for name in ("W_enc", "b_enc", "b_dec", "threshold")}
        files.write_arrays(path / f"params_layer_{n}.safetensors", arrays | {"w_dec": np.ones((12, 2, 6), np.float32)})
    points = {"hf_hook_point_in": "model.layers.{3,4}.output"}
    files.write_json(path / "config.json", {"architecture": "jump_relu"} | points)
    return path


def half_a_clt() -> Path:
    path = folder()
    arrays = {"W_enc_0": P["W_enc"].T, "b_enc_0": P["b_enc"], "b_dec_0": P["b_dec"]}
    files.write_arrays(path / "W_enc_0.safetensors", arrays)
    return path


def text_in(path: Path, file: str, text: str) -> Path:
    with contextlib.suppress(FileExistsError):
        path.mkdir(parents=True)
    (path / file).write_text(text)
    return path


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(name)


def put(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.update(entries)


SAE = "sae.safetensors"


def trained(**changes: Any) -> Path:
    """One of dictionary_learning with entries of its trainer's config changed."""
    return rewritten(learned(), "config.json", lambda content: content["trainer"].update(changes))


def sparse(**changes: Any) -> Path:
    return files.sparsify(folder("layers.1"), P, **changes)


def cross(**buffers: Any) -> Path:
    return files.crosscoder_sf(folder(), CROSS, **buffers)


def narrow(w: World) -> Any:
    return Crosscoder.load(cross()).decode(np.zeros((4, 6), np.float32))  # type: ignore[arg-type]


CASES: tuple[Case, ...] = (
    Case(
        "a key is missing", lambda w: load(rewritten(sparse(), SAE, drop("b_dec"))), DictionaryError, "b_dec is missing"
    ),
    Case("a key too many", lambda w: load(learned(extra=P["b_enc"])), DictionaryError, "extra", "mixed"),
    Case(
        "a matrix of another dictionary",
        lambda w: load(rewritten(sparse(), SAE, put(W_dec=files.parameters(6, 18)["W_dec"]))),
        DictionaryError,
        "W_dec has shape [18, 6]",
        "either order",
    ),
    Case("a NaN", lambda w: load(learned(p=with_nan())), DictionaryError, "decoder.weight holds NaN"),
    Case("half an npz", lambda w: load(cut(files.gemma_scope(folder(), P), "params.npz")), DictionaryError, "fetch it"),
    Case("half a safetensors file", lambda w: load(cut(sparse(), SAE)), DictionaryError, "half-downloaded"),
    Case("half a pickle", lambda w: load(cut(learned(), "ae.pt")), DictionaryError, "damaged"),
    Case("a pickle that runs code", lambda w: load(evil()), DictionaryError, "not a plain pickle"),
    Case("objects in an npz", lambda w: load(objects()), DictionaryError, "params.npz"),
    Case("half a config", lambda w: load(cut(learned(), "config.json")), DictionaryError, "not valid JSON"),
    Case(
        "a class that there is none of",
        lambda w: load(trained(dict_class="AutoEncodr")),
        DictionaryError,
        "AutoEncodr",
        "Did you mean 'AutoEncoder'",
    ),
    Case(
        "two classes have these arrays, and there is no config",
        lambda w: load(_without_config(learned("BatchTopKSAE", k=K))),
        DictionaryError,
        "config_overrides",
        "dict_class",
    ),
    Case(
        "arrays of another class",
        lambda w: load(trained(dict_class="GatedAutoEncoder")),
        DictionaryError,
        "gate_bias is missing",
    ),
    Case(
        "the config of another dictionary",
        lambda w: load(trained(dict_size=24)),
        DictionaryError,
        "dict_size=24 (arrays: 12)",
    ),
    Case("sparsify: number of latents", lambda w: load(sparse(num_latents=24)), DictionaryError, "num_latents=24"),
    Case("sparsify: activation", lambda w: load(sparse(activation="relu6")), DictionaryError, "relu6", "groupmax"),
    Case("sparsify: no k", lambda w: load(rewritten(sparse(), "cfg.json", drop("k"))), DictionaryError, "k is None"),
    Case("sparsify: more k than features", lambda w: load(sparse(k=99)), DictionaryError, "k=99"),
    Case(
        "Gemma Scope 2: architecture",
        lambda w: load(files.gemma_scope_2(folder(), P, *RESIDUAL, architecture="topk")),
        DictionaryError,
        "jump_relu",
    ),
    Case(
        "Gemma Scope 2: the config of the affine one",
        lambda w: load(files.gemma_scope_2(folder(), P, *RESIDUAL, affine_connection=True)),
        DictionaryError,
        "affine_connection=True",
        "two dictionaries",
    ),
    Case(
        "Gemma Scope 2: features that write backwards",
        lambda w: CrossLayerTranscoder.load(backwards()),
        DictionaryError,
        "earlier layers",
    ),
    Case(
        "OpenAI: activation",
        lambda w: load(files.openai(folder() / "autoencoders" / "4.pt", P, activation="Identity")),
        DictionaryError,
        "Identity",
    ),
    Case("Llama Scope: act_fn", lambda w: load(files.llama_scope(folder(), P, act_fn="gelu")), DictionaryError, "gelu"),
    Case(
        "Llama Scope: a norm for each token",
        lambda w: load(files.llama_scope(folder(), P, norm_activation="token-wise")),
        DictionaryError,
        "token-wise",
    ),
    Case(
        "Llama Scope: no norm",
        lambda w: load(files.llama_scope(folder(), P, dataset_average_activation_norm={"in": 0})),
        DictionaryError,
        "expected a positive number",
    ),
    Case(
        "Llama Scope: another kind of model",
        lambda w: load(files.llamascopium(folder(), P, "native", sae_type="lorsa")),
        DictionaryError,
        "lorsa",
    ),
    Case("a set: no layer chosen", lambda w: load(sets()), DictionaryError, "layers 0 to 1", "load_transcoders"),
    Case(
        "a set: a layer that there is none of", lambda w: load_transcoders(sets(), [2]), DictionaryError, "no layer 2"
    ),
    Case(
        "a set: negative thresholds",
        lambda w: load_transcoders(sets(p=P | {"threshold": -P["threshold"]})),
        DictionaryError,
        "12 of 12 thresholds are negative",
    ),
    Case(
        "a set: files in the order of their names",
        lambda w: load_transcoders(sets(transcoders=["layer_1.safetensors", "layer_0.safetensors"])),
        DictionaryError,
        "layer 0 is given the file layer_1.safetensors",
    ),
    Case(
        "a set: a file elsewhere",
        lambda w: load_transcoders(sets(transcoders=["../../layer_0.safetensors"])),
        DictionaryError,
        "within the directory",
    ),
    Case(
        "a set: a file that was not fetched",
        lambda w: load_transcoders(
            sets(1, transcoders=["hf://a/b/layer_0.safetensors", "hf://a/b/layer_1.safetensors"])
        ),
        DictionaryError,
        "layer_1.safetensors for layer 1",
    ),
    Case("a set: no YAML", lambda w: load_transcoders(text_in(sets(), "config.yaml", "a: [")), DictionaryError, "YAML"),
    Case(
        "a set that is empty",
        lambda w: load_transcoders(text_in(folder(), "note", "")),
        DictionaryError,
        "no transcoders",
    ),
    Case(
        "topk transcoders for circuit-tracer",
        lambda w: save_transcoders([one_transcoder(architecture="topk", k=2)], folder()),
        DictionaryError,
        "topk",
    ),
    Case(
        "a set without its first layer",
        lambda w: save_transcoders({1: one_transcoder()}, folder()),
        DictionaryError,
        "every layer from 0",
    ),
    Case(
        "a CLT without decoders",
        lambda w: CrossLayerTranscoder.load(half_a_clt()),
        DictionaryError,
        "W_dec_0.safetensors",
    ),
    Case(
        "a dictionary, not a crosscoder",
        lambda w: Crosscoder.load(sparse()),
        DictionaryError,
        "(sparsify), not a crosscoder",
    ),
    Case(
        "a crosscoder in no format", lambda w: Crosscoder.load(text_in(folder(), "a.txt", "")), DictionaryError, "a.txt"
    ),
    Case(
        "a crosscoder: how its code is normalised",
        lambda w: Crosscoder.load(cross(code_normalization_id=np.array(9))),
        DictionaryError,
        "code_normalization_id is 9",
    ),
    Case(
        "a crosscoder: one threshold for each source",
        lambda w: Crosscoder.load(cross(k=K, threshold=np.ones(2, np.float32))),
        DictionaryError,
        "threshold has 2 numbers",
    ),
    Case("features of another crosscoder", narrow, DictionaryError, "(4, 6)", "[5]"),
)


def _without_config(path: Path) -> Path:
    (path / "config.json").unlink()
    return path
