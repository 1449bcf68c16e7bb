"""State dicts and configs of TransformerLens 3.9: its own logits, and everything that must be refused.

``tests/golden/make_state_dicts.py`` made the file and says what is in it.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tljax import HookedTransformer
from tljax.checkpoints.files.hub import MODELS
from tljax.checkpoints.formats import transformer_lens
from tljax.checkpoints.layout import flatten
from tljax.errors import CheckpointError, ConfigError, FrozenModelError, InputError, UnsupportedModelError

GOLDEN = Path(__file__).parents[1] / "golden" / "state_dicts_transformerlens.safetensors"
State = dict[str, np.ndarray]
Config = dict[str, Any]


@functools.cache
def record() -> dict[str, Any]:
    with safe_open(GOLDEN, framework="numpy") as file:
        return json.loads(file.metadata()["record"])


def stored(name: str) -> np.ndarray:
    with safe_open(GOLDEN, framework="numpy") as file:
        return file.get_tensor(name)


def state_of(name: str) -> tuple[State, Config]:
    """A case's state dict and config."""
    start = f"{name}/state/"
    with safe_open(GOLDEN, framework="numpy") as file:
        state = {key.removeprefix(start): file.get_tensor(key) for key in file.keys() if key.startswith(start)}  # noqa: SIM118
    return state, dict(record()["cfg"][name])


@pytest.mark.parametrize("name", list(record()["cfg"]))
def test_logits_are_transformer_lens_s(name: str) -> None:
    model = HookedTransformer.from_transformer_lens(*state_of(name))
    logits = model(stored("tokens").astype(np.int32))
    np.testing.assert_allclose(logits, stored(f"{name}/logits"), rtol=1e-6, atol=5e-5)


def test_parameters_are_taken_as_they_are() -> None:
    state, cfg = state_of("gqa")
    model = HookedTransformer.from_transformer_lens(state, cfg)
    np.testing.assert_array_equal(model.blocks[0].attn._W_K, state["blocks.0.attn._W_K"])
    np.testing.assert_array_equal(model.blocks[0].attn.W_Q, state["blocks.0.attn.W_Q"])
    np.testing.assert_array_equal(model.W_U, state["unembed.W_U"])
    assert not model.cfg.weight_processing
    assert model.cfg.dtype == "float32"
    assert model.tokenizer is None


def test_processing_is_asked_for() -> None:
    state, cfg = state_of("ln")
    raw = HookedTransformer.from_transformer_lens(state, cfg)
    steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    processed = HookedTransformer.from_transformer_lens(state, cfg, **dict.fromkeys(steps, True))
    assert processed.cfg.normalization_type == "LNPre"
    assert processed.cfg.weight_processing == steps
    expected = raw.process_weights()
    for path, leaf in flatten(expected.params).items():
        np.testing.assert_array_equal(flatten(processed.params)[path], leaf, err_msg=path)
    with pytest.raises(InputError, match=r"no option 'fold_layernorm'"):
        HookedTransformer.from_transformer_lens(state, cfg, fold_layernorm=True)


def test_files_and_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    state, cfg = state_of("folded")
    weights, config = tmp_path / "weights.safetensors", tmp_path / "cfg.json"
    save_file(state, weights)
    config.write_text(json.dumps(cfg))
    tensors = {key: torch.from_numpy(value.copy()) for key, value in state.items()}
    torch.save(tensors, tmp_path / "weights.pt")

    class Config:
        def to_dict(self) -> dict[str, Any]:
            return cfg | {"dtype": torch.float32, "attn_scale": np.float64(cfg["attn_scale"])}

    expected = flatten(HookedTransformer.from_transformer_lens(state, cfg).params)
    for given, with_cfg in (
        (weights, config),
        (str(tmp_path / "weights.pt"), str(config)),
        (tensors, Config()),
        ({key: jax.device_put(value) for key, value in state.items()}, cfg),
        (state, transformer_lens.read_config(cfg)),
    ):
        model = HookedTransformer.from_transformer_lens(given, with_cfg)
        for path, leaf in flatten(model.params).items():
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    monkeypatch.setattr("tljax.checkpoints.files.reader.find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"weights\.pt.*torch is not installed"):
        HookedTransformer.from_transformer_lens(tmp_path / "weights.pt", cfg)


def test_dtypes_and_parts() -> None:
    state, cfg = state_of("ln")
    narrow = {key: value.astype("bfloat16") for key, value in state.items()}
    model = HookedTransformer.from_transformer_lens(narrow, cfg | {"dtype": "torch.bfloat16"})
    assert model.cfg.dtype == "bfloat16"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    wide = HookedTransformer.from_transformer_lens(narrow, cfg, dtype="float32", first_n_layers=1, n_ctx=5)
    assert (wide.cfg.n_layers, wide.cfg.n_ctx, wide.cfg.dtype) == (1, 5, "float32")
    np.testing.assert_array_equal(wide.W_pos, narrow["pos_embed.W_pos"][:5].astype(np.float32))
    with pytest.raises(ConfigError, match=r"n_ctx=9 is longer than the 8 positions"):
        HookedTransformer.from_transformer_lens(state, cfg, n_ctx=9)


def test_the_tokenizer_comes_from_a_directory_or_not_at_all() -> None:
    state, cfg = state_of("folded")
    assert HookedTransformer.from_transformer_lens(state, cfg | {"tokenizer_name": "gpt2"}).tokenizer is None
    model = HookedTransformer.from_transformer_lens(state, cfg | {"tokenizer_name": str(MODELS / "tljax-tiny")})
    assert model.tokenizer is not None
    assert HookedTransformer.from_transformer_lens(state, cfg, tokenizer=model.tokenizer).tokenizer is not None


def test_torch_is_not_imported(tmp_path: Path) -> None:
    state, cfg = state_of("attn_only")
    save_file(state, tmp_path / "state.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    code = (
        "import sys, tljax\n"
        "tljax.HookedTransformer.from_transformer_lens('state.safetensors', 'cfg.json')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_every_mismatch_is_named_at_once() -> None:
    state, cfg = state_of("ln")
    del state["blocks.1.attn.b_K"], state["ln_final.b"]
    state["blocks.0.mlp.W_in"] = state["blocks.0.mlp.W_in"][:, :-1]
    state["blocks.2.attn.W_Q"] = state["blocks.1.attn.W_Q"]
    with pytest.raises(CheckpointError) as caught:
        HookedTransformer.from_transformer_lens(state, cfg)
    message = str(caught.value)
    assert "The state dict does not hold the tensors its cfg describes" in message
    for part in (
        "2 missing: blocks.1.attn.b_K [2, 6]; ln_final.b [8]",
        "1 unexpected: blocks.2.attn.W_Q [2, 8, 6]",
        "blocks.0.mlp.W_in is [8, 9], cfg says [8, 10]",
    ):
        assert part in message


def test_folded_unfolded_and_turned_are_told_apart() -> None:
    (plain, plain_cfg), (folded, folded_cfg) = state_of("ln"), state_of("folded")
    with pytest.raises(CheckpointError, match=r"No norm has a weight.*normalization_type='LNPre'"):
        HookedTransformer.from_transformer_lens(folded, folded_cfg | {"normalization_type": "LN"})
    with pytest.raises(CheckpointError, match=r"not folded: then cfg has normalization_type='LN'"):
        HookedTransformer.from_transformer_lens(plain, plain_cfg | {"normalization_type": "LNPre"})
    turned = {
        key: value.swapaxes(-2, -1) if key.rpartition(".")[2].startswith("W_") else value
        for key, value in folded.items()
    }
    with pytest.raises(CheckpointError, match=r"the other way round, as in state dicts of 2022.*swap"):
        HookedTransformer.from_transformer_lens(turned, folded_cfg)


def test_every_field_of_3_9_has_a_fate() -> None:
    known = {*transformer_lens._SAME, *transformer_lens._INERT, *transformer_lens._UNSET, "use_logn_attn"}
    assert known == set(record()["cfg"]["ln"])
    assert len(known) == 87


def test_load_state_dict_says_where_to_go() -> None:
    state, cfg = state_of("folded")
    model = HookedTransformer.from_transformer_lens(state, cfg)
    with pytest.raises(FrozenModelError, match=r"HookedTransformer\.from_transformer_lens\(state_dict, cfg\)"):
        model.load_state_dict(state, strict=False)
