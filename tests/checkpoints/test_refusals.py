"""Everything a checkpoint can have wrong with it: each is refused, and explained, before a weight is read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import rewrite, shard
from safetensors.numpy import load_file

from tljax import HookedTransformer
from tljax.checkpoints import Loaded, load_checkpoint
from tljax.checkpoints.files import reader
from tljax.errors import CheckpointError, UnsupportedModelError

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}


def load_raw(directory: Path) -> Loaded:
    return load_checkpoint(directory, **RAW)


def damage(directory: Path, file: str, change: Callable[[bytes], bytes]) -> None:
    (directory / file).write_bytes(change((directory / file).read_bytes()))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_safetensors(keep: int, gpt2: Path, tmp_path: Path) -> None:
    rewrite(gpt2, tmp_path)
    damage(tmp_path, "model.safetensors", lambda content: content[:keep])
    what = r"is empty \(0 bytes\), as an interrupted download .*" if keep == 0 else "cannot be read.*half-downloaded"
    with pytest.raises(CheckpointError, match=rf"model.safetensors {what}: fetch it again"):
        load_raw(tmp_path)


def test_git_lfs_pointer(gpt2: Path, tmp_path: Path) -> None:
    rewrite(gpt2, tmp_path)
    damage(tmp_path, "model.safetensors", lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=r"is a git-lfs pointer.*git lfs pull"):
        load_raw(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "", "a\\b", "C:x", 3, None]
)
def test_index_that_points_outside_its_directory(name: Any, gpt2: Path, tmp_path: Path) -> None:
    directory = shard(gpt2, tmp_path / "model")
    (tmp_path / "secret.safetensors").write_bytes((gpt2 / "model.safetensors").read_bytes())
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["transformer.wte.weight"] = name
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"A shard must be a plain file name next to the index"):
        load_raw(directory)


def test_missing_shard_and_lying_index(gpt2: Path, tmp_path: Path) -> None:
    directory = shard(gpt2, tmp_path)
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    moved = index["weight_map"]["transformer.wte.weight"]
    index["weight_map"]["transformer.wte.weight"] = next(n for n in index["weight_map"].values() if n != moved)
    index_file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"disagree on 1 tensors: transformer.wte.weight"):
        load_raw(directory)
    (directory / moved).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of the 3 shards its index names: {moved}"):
        load_raw(directory)
    index_file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no 'weight_map'"):
        load_raw(directory)


def test_missing_extra_and_misshapen_tensors(gpt2: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del tensors["transformer.h.2.mlp.c_fc.bias"]
        return tensors | {"transformer.h.3.ln_1.bias": np.zeros(32, np.float32)}

    with pytest.raises(CheckpointError, match=r"(?s)1 missing: .*c_fc.bias \[128\].*1 unexpected: .*h.3.ln_1.bias"):
        load_raw(rewrite(gpt2, tmp_path / "a", change))
    with pytest.raises(CheckpointError, match=r"wte.weight is \[40, 32\], config.json says \[41, 32\]"):
        load_raw(rewrite(gpt2, tmp_path / "b", config=lambda c: c | {"vocab_size": 41}))


def test_untied_head_that_is_not_stored(gpt2: Path, tmp_path: Path) -> None:
    directory = rewrite(gpt2, tmp_path, config=lambda c: c | {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head.weight \[40, 32\]"):
        load_raw(directory)


def test_unknown_architecture_is_refused_before_any_weights_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*Supported: GPT2LMHeadModel"):
        load_raw(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json; it holds"),
        ("{", "is not valid JSON"),
        ("[]", "holds a JSON list"),
        ("", "not valid"),
    ],
)
def test_missing_or_broken_config(content: str | None, message: str, tmp_path: Path) -> None:
    directory = tmp_path / "half"
    directory.mkdir()
    (directory / "model.safetensors.incomplete").write_bytes(b"")
    if content is not None:
        (directory / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_raw(directory)


def test_half_downloaded_directory(gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    (tmp_path / "model.safetensors.incomplete").write_bytes(b"123")
    with pytest.raises(CheckpointError, match=r"has no weights.*model.safetensors.incomplete.*interrupted download"):
        load_raw(tmp_path)


def test_pickle_without_torch(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setattr(reader, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"PyTorch pickle.*pip install torch"):
        load_raw(tmp_path)


class Evil:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("content", [b"", b"not a pickle", "evil"])
def test_damaged_and_malicious_pickles(content: Any, gpt2: Path, tmp_path: Path) -> None:
    import torch

    (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    if content == "evil":
        torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    else:
        (tmp_path / "pytorch_model.bin").write_bytes(content)
    what = r"is empty \(0 bytes\)" if content == b"" else "is not a plain pickle of tensors, or is damaged"
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin {what}"):
        load_raw(tmp_path)
    assert not Path("pwned").exists()


def test_float8_checkpoint(gpt2: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    tensors = {name: torch.from_numpy(array) for name, array in load_file(gpt2 / "model.safetensors").items()}
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.float8_e4m3fn)
    save_torch(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"wte.weight as F8_E4M3.*full-precision"):
        load_raw(tmp_path)


def test_nothing_is_read_from_a_checkpoint_that_is_refused(
    gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = rewrite(gpt2, tmp_path, lambda t: t | {"surprise": np.zeros(2, np.float32)})
    monkeypatch.setattr(reader.SafetensorsFiles, "read", lambda self, key: pytest.fail("a weight was read"))
    with pytest.raises(CheckpointError, match=r"unexpected: surprise"):
        load_raw(directory)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("gpt2", {"n_layer": 9999}, r"stores 40 tensors, fewer than the 9999 layers"),
        ("qwen3_moe_gqa", {"num_experts": 10**8, "num_local_experts": 10**8}, r"fewer than the 100000000 experts"),
        ("gpt2", {"vocab_size": 2**31 - 1}, r"config.json says \[2147483647, 32\]"),
    ],
)
def test_counts_that_the_headers_contradict_are_refused_at_once(
    variant: str, change: dict[str, Any], message: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = rewrite(hf_checkpoint(variant), tmp_path, config=lambda config: config | change)
    with pytest.raises(CheckpointError, match=message):
        load_raw(directory)


def test_a_key_is_ignored_through_every_way_to_load(gpt2: Path, tmp_path: Path) -> None:
    directory = rewrite(gpt2, tmp_path, config=lambda config: config | {"alibi": 8})
    with pytest.raises(UnsupportedModelError, match="alibi=8"):
        load_raw(directory)
    model = HookedTransformer.from_pretrained(directory, ignore_config=["alibi"])
    assert model.cfg == HookedTransformer.from_pretrained(gpt2).cfg.replace(model_name=model.cfg.model_name)
