"""Files of dictionaries that are damaged, of another kind or for another model; directories and releases misnamed."""

import json
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from table import Case

from tljax.dictionaries import SAE, Crosscoder, Dictionary, DictionaryConfig, Tap, check_dictionary, fit_to, sae_ids
from tljax.errors import DictionaryError

D, F = 64, 96
SITE = "blocks.2.hook_resid_pre"


def dictionary(**tap: Any) -> Dictionary:
    draw = np.random.default_rng(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    params = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Dictionary(params, DictionaryConfig(d_in=D, d_sae=F, tap=Tap(**{"reads": SITE, "processing": ()} | tap)))


def saved(arrays: Any = None, **changes: Any) -> Path:
    """A dictionary in SAELens's format, with keys of its config and arrays changed; ``None`` takes one away."""
    path = Path(tempfile.mkdtemp())
    dictionary().save(path)
    cfg = json.loads((path / "cfg.json").read_text()) | changes
    (path / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
    file = path / "sae_weights.safetensors"
    held = {**load_file(file), **(arrays or {})}
    save_file({name: array for name, array in held.items() if array is not None}, file)
    return path


def nan() -> np.ndarray:
    array = np.zeros((D, F), np.float32)
    array[3, 5] = np.nan
    return array


def cut(path: Path, name: str) -> Path:
    (path / name).write_bytes((path / name).read_bytes()[:40])
    return path


def two_formats() -> Path:
    path = saved()
    np.savez(path / "params.npz", W_enc=np.zeros((D, F)))
    return path


def with_subfolder() -> Path:
    path = Path(tempfile.mkdtemp())
    dictionary().save(path / "blocks.8.hook_resid_pre")
    return path


E = DictionaryError
CASES = [
    Case(
        "a directory that is not there",
        lambda _: Dictionary.load("/no/such"),
        E,
        "no directory /no/such",
        "Nothing was",
    ),
    Case(
        "a misspelt directory", lambda _: SAE.from_pretrained("./tests/dictionaris"), E, "no directory", "dictionaries"
    ),
    Case("an empty directory", lambda _: Dictionary.load(tempfile.mkdtemp()), E, "is empty", "saelens: cfg.json and"),
    Case(
        "the folder above", lambda _: SAE.load(with_subfolder()), E, "blocks.8.hook_resid_pre/ in it is one", "sae_id"
    ),
    Case(
        "a misspelt folder",
        lambda _: SAE.from_pretrained(with_subfolder(), "blocks.8.hook_resid_pr"),
        E,
        "has no",
        "mean",
    ),
    Case("two formats in one directory", lambda _: SAE.load(two_formats()), E, "several formats", "format='saelens'"),
    Case("two formats, one named", lambda _: SAE.load(two_formats(), format="saelens").cfg.d_sae, equals=F),
    Case("a format's name", lambda _: SAE.load(saved(), format="sealens"), E, "'sealens' is not known", "'saelens'"),
    Case(
        "another kind",
        lambda _: Crosscoder.load(saved()),
        E,
        "is a dictionary (saelens), not a crosscoder",
        "Dictionary",
    ),
    Case("a misspelt release", lambda _: SAE.from_pretrained("gpt2-small-res-jbb", SITE), E, "'gpt2-small-res-jb'"),
    Case(
        "a release alone",
        lambda _: SAE.from_pretrained("gpt2-small-res-jb"),
        E,
        "needs sae_id",
        "blocks.8.hook_resid_pre",
    ),
    Case(
        "a layer too many",
        lambda _: SAE.from_pretrained("gpt2-small-res-jb", "blocks.12.hook_resid_pre"),
        E,
        "It has 13",
    ),
    Case("ids of no release", lambda _: sae_ids("gemma-scope-2b-pt-re"), E, "Did you mean", "gemma-scope-2b-pt-res"),
    Case(
        "a revision of a directory", lambda _: SAE.from_pretrained(saved(), revision="v1"), E, "which has one revision"
    ),
    Case(
        "weights cut short", lambda _: SAE.load(cut(saved(), "sae_weights.safetensors")), E, "damaged", "fetch it again"
    ),
    Case("a config cut short", lambda _: SAE.load(cut(saved(), "cfg.json")), E, "cfg.json is not valid JSON"),
    Case("a NaN", lambda _: SAE.load(saved({"W_enc": nan()})), E, "W_enc holds NaN", "training had diverged"),
    Case("an array that is missing", lambda _: SAE.load(saved({"b_enc": None})), E, "b_enc [96] is missing"),
    Case("an array too many", lambda _: SAE.load(saved({"W_gate": np.ones(F, np.float32)})), E, "W_gate is unknown"),
    Case("another width", lambda _: SAE.load(saved(d_in=48)), E, "W_enc has shape [64, 96], expected [48, 96]"),
    Case("no width", lambda _: SAE.load(saved(d_sae=None)), E, "does not say d_sae"),
    Case("a width in words", lambda _: SAE.load(saved(d_sae="96")), E, "d_sae='96' is not a whole number"),
    Case(
        "a half-known activation", lambda _: SAE.load(saved(activation_fn_str="tanh-relu")), E, "'tanh-relu'", "as ReLU"
    ),
    Case("top-k without k", lambda _: SAE.load(saved(activation_fn_str="topk")), E, "no k", "activation_fn_kwargs"),
    Case("a flag in words", lambda _: SAE.load(saved(apply_b_dec_to_input="no")), E, "='no' is not True or False"),
    Case("heads of later", lambda _: SAE.load(saved(reshape_activations="hook_q")), E, "'hook_q'", '"hook_z"'),
    Case("half a feature", lambda _: SAE.load(saved(architecture="topk", k=2.5)), E, "k=2.5", "a whole number"),
    Case(
        "an architecture of later",
        lambda _: SAE.load(saved(architecture="jumprelu2")),
        E,
        "'jumprelu2'",
        "Did you mean",
    ),
    Case("a normalisation of later", lambda _: SAE.load(saved(normalize_activations="l2")), E, "'l2'", "layer_norm"),
    Case("a dtype that JAX lacks", lambda _: SAE.load(saved(dtype="int8")), E, "dtype 'int8'", "bfloat16"),
    Case(
        "factors that were finetuned",
        lambda _: SAE.load(saved({"scaling_factor": np.full(F, 2.0, np.float32)})),
        E,
        "multiplies features in the decoder",
    ),
    Case(
        "sizes too large for float16",
        lambda _: SAE.load(saved({"W_enc": np.full((D, F), 1e6, np.float32)}, dtype="float16")),
        E,
        "W_enc holds numbers that float16 has not",
        'dtype="float32"',
    ),
    Case(
        "a scale that has no use", lambda _: SAE.from_pretrained(saved(), norm_scaling_factor=2.0), E, "has no use here"
    ),
    Case("a prompt without a model", lambda _: SAE.from_pretrained(saved(), prompt="a"), E, "pass model= too"),
    Case(
        "a stack saved as one",
        lambda _: Dictionary({k: jnp.stack([v, v]) for k, v in dictionary().params.items()}, dictionary().cfg).save(
            tempfile.mkdtemp()
        ),
        E,
        "stack of 2 dictionaries",
        "save each",
    ),
    Case(
        "raw activations' dictionary on processed weights",
        lambda w: fit_to(dictionary(), w.tiny),
        E,
        "trained on a model with raw weights",
        "from_pretrained_no_processing('tljax-tiny')",
    ),
    Case(
        "a site that is not there",
        lambda w: fit_to(dictionary(reads="blocks.9.hook_resid_pre"), w.tiny),
        E,
        "none of this model",
        "blocks.9",
    ),
    Case(
        "a site of another width",
        lambda w: fit_to(dictionary(reads="blocks.1.mlp.hook_post"), w.tiny),
        E,
        "reads 64 numbers",
        "256 wide",
    ),
    Case(
        "another model",
        lambda w: fit_to(
            dictionary(model_name="gpt2"), w.tiny.replace(cfg=w.tiny.cfg.replace(model_name="EleutherAI/pythia-70m"))
        ),
        E,
        "is of gpt2",
        "EleutherAI/pythia-70m",
        "any_model=True",
    ),
    Case("features of noise", lambda w: check_dictionary(dictionary(), w.tiny, w.P), E, "does not explain", "FVU"),
]
