"""Loading: variants of what is on disk, options, placement, and everything that must be refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import same_bits
from double_precision import double_precision
from hf_models import rewrite, shard
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from tljax import HookedTransformer
from tljax.checkpoints import Loaded, load_checkpoint, save_native
from tljax.checkpoints.files import hub
from tljax.checkpoints.formats import native
from tljax.checkpoints.layout import flatten
from tljax.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from tljax.weights import process_weights

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}


def load_raw(directory: Path, **options: Any) -> Loaded:
    return load_checkpoint(directory, **RAW, **options)


def without_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of a checkpoint saved from the bare model, head aside."""
    heads = ("lm_head.weight", "embed_out.weight")
    return {name if name in heads else name.partition(".")[2]: tensor for name, tensor in tensors.items()}


# What is on disk


def test_parameters_are_the_checkpoint_s(gpt2: Path) -> None:
    loaded, stored = load_raw(gpt2), load_file(gpt2 / "model.safetensors")
    block = loaded.params["blocks"][1]
    np.testing.assert_array_equal(loaded.params["embed"]["W_E"], stored["transformer.wte.weight"])
    np.testing.assert_array_equal(loaded.params["unembed"]["W_U"], stored["transformer.wte.weight"].T)
    np.testing.assert_array_equal(
        block["attn"]["W_K"].reshape(32, 32), stored["transformer.h.1.attn.c_attn.weight"][:, 32:64]
    )
    np.testing.assert_array_equal(block["ln2"]["b"], stored["transformer.h.1.ln_2.bias"])
    assert not loaded.params["unembed"]["b_U"].any()
    assert loaded.cfg.model_name == gpt2.name
    assert loaded.tokenizer_source is None


@pytest.mark.parametrize("variant", ["gpt2_untied", "neox", "llama_gqa_bias"])
def test_shards_and_bare_names_are_the_same_checkpoint(
    variant: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = hf_checkpoint(variant)
    expected = load_raw(source).params
    same_bits(load_raw(shard(source, tmp_path / "sharded")).params, expected)
    same_bits(load_raw(rewrite(source, tmp_path / "bare", without_prefix)).params, expected)


def test_buffers_of_old_checkpoints_are_ignored_and_tied_heads_may_be_stored(gpt2: Path, tmp_path: Path) -> None:
    extra = {
        "transformer.h.0.attn.bias": np.ones((1, 1, 24, 24), np.uint8),
        "transformer.h.2.attn.masked_bias": np.float32(-1e4).reshape(1),
    }
    old = rewrite(gpt2, tmp_path, lambda t: t | extra | {"lm_head.weight": t["transformer.wte.weight"] + 1})
    with pytest.warns(UserWarning, match=r"ties lm_head.weight to transformer.wte.weight .*as transformers does"):
        loaded = load_raw(old)
    same_bits(loaded.params["embed"], load_raw(gpt2).params["embed"])
    np.testing.assert_array_equal(loaded.params["unembed"]["W_U"], load_raw(gpt2).params["unembed"]["W_U"] + 1)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32"])
def test_any_stored_dtype_to_any_dtype(stored: str, wanted: str, gpt2: Path, tmp_path: Path) -> None:
    directory = rewrite(gpt2, tmp_path, lambda t: {name: tensor.astype(stored) for name, tensor in t.items()})
    loaded = load_raw(directory, dtype=wanted)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {wanted}
    assert loaded.cfg.dtype == wanted
    expected = load_file(gpt2 / "model.safetensors")["transformer.wte.weight"].astype(stored).astype(wanted)
    np.testing.assert_array_equal(np.asarray(loaded.params["embed"]["W_E"]), expected)


def test_processing_happens_before_rounding(gpt2: Path) -> None:
    whole, half = load_checkpoint(gpt2), load_checkpoint(gpt2, dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), whole.params)
    for path, leaf in flatten(half.params).items():
        np.testing.assert_allclose(np.asarray(leaf, "float32"), flatten(rounded)[path], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("variant", ["gpt2", "neox_sequential", "llama_gqa_bias"])
def test_streamed_processing_is_processing(variant: str, hf_checkpoint: Callable[[str], Path]) -> None:
    raw, streamed = load_raw(hf_checkpoint(variant)), load_checkpoint(hf_checkpoint(variant))
    params, cfg = process_weights(raw.params, raw.cfg)
    same_bits(params, streamed.params)
    assert cfg == streamed.cfg


def test_pickles_are_read_when_torch_is_here(gpt2: Path, tmp_path: Path) -> None:
    import torch

    tensors = {
        name: torch.from_numpy(array).bfloat16() for name, array in load_file(gpt2 / "model.safetensors").items()
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    expected = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), load_raw(gpt2).params)
    same_bits(load_raw(tmp_path, dtype="bfloat16").params, expected)


# Options


def test_shorter_context_cuts_learned_positions(gpt2: Path) -> None:
    loaded = load_raw(gpt2, n_ctx=10)
    assert loaded.cfg.n_ctx == 10
    np.testing.assert_array_equal(loaded.params["pos_embed"]["W_pos"], load_raw(gpt2).params["pos_embed"]["W_pos"][:10])
    with pytest.raises(ConfigError, match=r"n_ctx=25 is longer than the 24 positions"):
        load_raw(gpt2, n_ctx=25)


def test_rotary_models_may_run_longer(hf_checkpoint: Callable[[str], Path]) -> None:
    assert load_raw(hf_checkpoint("llama_mha"), n_ctx=100).cfg.n_ctx == 100


def test_first_layers_only(gpt2: Path) -> None:
    loaded, whole = load_raw(gpt2, first_n_layers=2), load_raw(gpt2)
    assert loaded.cfg.n_layers == 2
    same_bits(loaded.params, whole.params | {"blocks": whole.params["blocks"][:2]})
    with pytest.raises(ConfigError, match=r"first_n_layers=4 is not between 1 and the checkpoint's 3"):
        load_raw(gpt2, first_n_layers=4)


def test_options_that_there_are_none_of(gpt2: Path) -> None:
    with pytest.raises(InputError, match=r"no option 'fold_lm'. Did you mean 'fold_ln'"):
        load_checkpoint(gpt2, fold_lm=True)
    with pytest.raises(InputError, match="2 devices were asked for, and jax sees 1"):
        load_checkpoint(gpt2, n_devices=2)
    same_bits(load_checkpoint(gpt2, n_devices=1, dtype=None).params, load_checkpoint(gpt2).params)


def test_float64_needs_x64(gpt2: Path) -> None:
    with pytest.raises(ConfigError, match=r"float64 needs .*jax_enable_x64"):
        load_raw(gpt2, dtype="float64")


def test_float64_is_read_and_processed_in_float64(gpt2: Path, tmp_path: Path) -> None:
    """Numbers that float32 does not hold arrive, and processing loses nothing that float64 holds."""
    tensors = {}

    def widened(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        tensors.update({key: value + 1e-9 * rng.standard_normal(value.shape) for key, value in stored.items()})
        return tensors

    tokens = np.array([[3, 17, 5, 38, 0, 22, 9, 30]])
    with double_precision():
        for source in (gpt2, rewrite(gpt2, tmp_path, widened)):  # stored in float32, and in float64
            raw = HookedTransformer.from_pretrained_no_processing(source, dtype="float64")
            processed = HookedTransformer.from_pretrained(source, dtype="float64")
            assert {leaf.dtype.name for leaf in jax.tree.leaves(processed.params)} == {"float64"}
            expected = jax.nn.log_softmax(raw(tokens))
            for model in (processed, raw.process_weights()):
                np.testing.assert_allclose(jax.nn.log_softmax(model(tokens)), expected, atol=1e-12, rtol=0)
        np.testing.assert_array_equal(raw.params["embed"]["W_E"], tensors["transformer.wte.weight"])


def test_tokenizer_source_is_the_directory_that_holds_one(gpt2: Path, tmp_path: Path) -> None:
    rewrite(gpt2, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_raw(tmp_path).tokenizer_source == tmp_path


# Placement


@pytest.mark.parametrize("processed", [False, True])
def test_placement_by_name_device_sharding_and_rule(gpt2: Path, processed: bool) -> None:
    device = jax.devices("cpu")[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    seen: dict[str, tuple[int, ...]] = {}

    def rule(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        seen[path] = shape
        return sharding

    options = {} if processed else RAW
    expected = load_checkpoint(gpt2, **options).params
    for where in ("cpu", "cpu:0", device, sharding, rule):
        params = load_checkpoint(gpt2, device=where, **options).params
        assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(params))
        same_bits(params, expected)
    assert seen["blocks.2.attn.W_Q"] == (32, 4, 8)
    assert seen.keys() >= flatten(expected).keys()
    with pytest.raises(InputError, match=r"device='quantum'"):
        load_checkpoint(gpt2, device="quantum")


_SHARDED = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tljax.checkpoints import load_checkpoint
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("heads", "other"))
def rule(path, shape):
    split = {"W_Q": P(None, "heads"), "W_in": P(None, "other"), "W_U": P(None, "other")}
    return NamedSharding(mesh, split.get(path.split(".")[-1], P()))
whole, parts = load_checkpoint(sys.argv[1]), load_checkpoint(sys.argv[1], device=rule)
for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(whole.params), jax.tree.leaves(parts.params)):
    np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))
    assert len(b.sharding.device_set) == 8, path
assert parts.params["blocks"][0]["attn"]["W_Q"].addressable_shards[0].data.shape == (32, 1, 8)
assert parts.params["unembed"]["W_U"].addressable_shards[0].data.shape == (32, 20)
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules)
print("sharded")
"""


def test_a_sharded_load_puts_a_part_on_each_device_and_imports_nothing_heavy(gpt2: Path) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", _SHARDED, str(gpt2)], capture_output=True, text=True, env=environment, cwd=root
    )
    assert run.stdout.strip() == "sharded", run.stderr


# Our own format


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_format_round_trip_is_bit_equal(processed: bool, dtype: str, gpt2: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(gpt2, dtype=dtype, **({} if processed else RAW))
    save_native(loaded.params, loaded.cfg, None, tmp_path / "new" / "model")
    back = load_checkpoint(tmp_path / "new" / "model", dtype=dtype, **({} if processed else RAW))
    assert back.cfg == loaded.cfg
    same_bits(back.params, loaded.params)
    assert sorted(file.name for file in (tmp_path / "new" / "model").iterdir()) == ["config.json", "model.safetensors"]
    import safetensors

    with safetensors.safe_open(tmp_path / "new" / "model" / "model.safetensors", framework="numpy") as file:
        assert "blocks.2.attn.W_Q" in file.keys()  # noqa: SIM118


def test_failed_save_leaves_the_old_checkpoint(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_raw(gpt2)
    save_native(loaded.params, loaded.cfg, None, tmp_path)
    changed = jax.tree.map(lambda leaf: leaf + 1, loaded.params)
    written: list[Any] = []

    def fail(array: Any) -> Any:
        written.append(array)
        if len(written) == 10:
            raise OSError("disk full")
        return np.asarray(array)

    monkeypatch.setattr(native, "as_numpy", fail)
    with pytest.raises(OSError, match=r"disk full"):
        save_native(changed, loaded.cfg, None, tmp_path)
    monkeypatch.undo()
    same_bits(load_raw(tmp_path).params, loaded.params)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_parameters_that_do_not_fit_is_refused(gpt2: Path, tmp_path: Path) -> None:
    loaded = load_raw(gpt2)
    with pytest.raises(CheckpointError, match=r"embed.W_E is \(40, 32\), should be \(41, 32\)"):
        save_native(loaded.params, loaded.cfg.replace(d_vocab=41), None, tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"blocks.3.attn.W_O is absent, should be \(4, 8, 32\)"):
        save_native(loaded.params, loaded.cfg.replace(n_layers=4), None, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_format_of_the_future_and_unknown_fields_are_refused(gpt2: Path, tmp_path: Path) -> None:
    loaded = load_raw(gpt2)
    save_native(loaded.params, loaded.cfg, None, tmp_path)
    attributes = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(attributes | {"tljax_format": 2}))
    with pytest.raises(UnsupportedModelError, match=r"tljax_format=2.*update tljax"):
        load_raw(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(attributes | {"d_modle": 3}))
    with pytest.raises(CheckpointError, match=r"'d_modle' is not a config field. Did you mean 'd_model'"):
        load_raw(tmp_path)


# Names


def test_a_directory_never_touches_the_network(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("the hub was asked"))
    load_raw(gpt2)
    monkeypatch.chdir(gpt2.parent)
    load_checkpoint(f"./{gpt2.name}")
    with pytest.raises(CheckpointError, match=r"is not a directory"):
        load_checkpoint("./nowhere")
    with pytest.raises(InputError, match=r"is a directory, which has one revision"):
        load_checkpoint(gpt2, revision="main")


def test_bundled_models_load_by_name(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_raw(gpt2)
    save_native(loaded.params, loaded.cfg.replace(model_name="tljax-tiny"), None, tmp_path / "tljax-tiny")
    monkeypatch.setattr(hub, "MODELS", tmp_path)
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("the hub was asked"))
    same_bits(load_checkpoint("tljax-tiny", **RAW).params, loaded.params)
    assert load_checkpoint("TLJAX-tiny").cfg.model_name == "tljax-tiny"


def test_a_stray_directory_does_not_hide_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_download", lambda repo, *_, **__: (_ for _ in ()).throw(LookupError(repo)))
    with pytest.raises(CheckpointError, match=r"openai-community/gpt2 failed: LookupError"):
        load_checkpoint("gpt2")
    save_file({"x": np.zeros(1)}, tmp_path / "gpt2" / "model.safetensors")
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"describes None"):
        load_checkpoint("gpt2")


def test_loading_compiles_one_program_a_stage(gpt2: Path, compilations: Any) -> None:
    load_checkpoint(gpt2, n_ctx=9)
    assert compilations.count <= 8  # three stages and what jax compiles for its own constants
    before = compilations.count
    load_checkpoint(gpt2, n_ctx=9)
    assert compilations.count == before
    assert jnp.zeros(()).dtype == "float32"
