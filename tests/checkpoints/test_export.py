"""Writing Hugging Face checkpoints: dtypes, heads, and what cannot be expressed. Every family: ``tests/families``."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tljax import HookedTransformerConfig
from tljax.checkpoints import load_checkpoint, save_hf
from tljax.checkpoints.layout import parameter_shapes, unflatten
from tljax.errors import UnsupportedModelError

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}


def test_export_keeps_the_dtype(gpt2: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(gpt2, dtype="bfloat16", **RAW)
    save_hf(loaded.params, loaded.cfg, tmp_path)
    assert {tensor.dtype.name for tensor in load_file(tmp_path / "model.safetensors").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_head_that_moved_away_from_the_embedding_is_written(gpt2: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(gpt2, **RAW)
    params = loaded.params | {"unembed": {**loaded.params["unembed"], "W_U": loaded.params["unembed"]["W_U"] + 1}}
    save_hf(params, loaded.cfg, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_checkpoint(tmp_path, **RAW).params["unembed"]["W_U"], params["unembed"]["W_U"])


def test_folded_models_are_refused(gpt2: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(gpt2)
    with pytest.raises(UnsupportedModelError, match=r"'LNPre'.*from_pretrained_no_processing"):
        save_hf(loaded.params, loaded.cfg, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_bias_the_architecture_lacks_is_refused(gpt2: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(gpt2, **RAW)
    params = loaded.params | {"unembed": {**loaded.params["unembed"], "b_U": jnp.ones(40)}}
    with pytest.raises(UnsupportedModelError, match=r"unembed\.b_U not zero, but GPT2LMHeadModel has no such bias"):
        save_hf(params, loaded.cfg, tmp_path)


def tiny(**fields: Any) -> tuple[dict[str, Any], HookedTransformerConfig]:
    cfg = HookedTransformerConfig(**({"d_model": 8, "n_layers": 1, "n_heads": 2, "n_ctx": 4, "d_vocab": 5} | fields))
    flat = {path: np.ones(shape, np.float32) for path, shape in parameter_shapes(cfg).items()}
    flat = {path: 0 * leaf if ".b_" in path else leaf for path, leaf in flat.items()}
    return jax.tree.map(jnp.asarray, unflatten(flat)), cfg


def test_a_model_made_here_is_exported_as_the_family_that_fits(tmp_path: Path) -> None:
    params, cfg = tiny(act_fn="gelu", parallel_attn_mlp=True, positional_embedding_type="rotary")
    save_hf(params, cfg, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPTNeoXForCausalLM"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_fn": "solu"}, "No Hugging Face architecture fits this model"),
        ({"attn_only": True}, r"GPT2LMHeadModel cannot express .*attn_only=True"),
        ({"original_architecture": "Bloom"}, r"Bloom is not one of .*GPT2LMHeadModel"),
        (
            {"original_architecture": "GPT2LMHeadModel", "act_fn": "gelu", "n_key_value_heads": 1},
            "cannot express n_key_value_heads=1",
        ),
        ({"act_fn": "gelu", "d_vocab_out": 3}, "cannot express d_vocab_out=3"),
    ],
)
def test_models_no_architecture_can_express(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    params, cfg = tiny(**fields)
    with pytest.raises(UnsupportedModelError, match=message):
        save_hf(params, cfg, tmp_path / "x")
    assert not (tmp_path / "x").exists()
