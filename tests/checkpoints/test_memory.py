"""``hf_model=``: a transformers model in memory loads as its directory does, without a copy on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import make_hf_model
from safetensors.numpy import load_file

from tljax import HookedTransformer
from tljax.checkpoints import load_checkpoint
from tljax.checkpoints.files import reader
from tljax.checkpoints.files.hub import MODELS
from tljax.checkpoints.formats.memory import MemoryTensors, read_hf_model
from tljax.checkpoints.layout import flatten
from tljax.errors import InputError, UnsupportedModelError

Loader = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Returns a variant's model and its directory."""
    known: dict[str, tuple[Any, Path]] = {}

    def get(variant: str) -> tuple[Any, Path]:
        if variant not in known:
            directory = tmp_path_factory.mktemp(variant)
            known[variant] = make_hf_model(variant, directory), directory
        return known[variant]

    return get


@pytest.mark.parametrize("variant", ["gpt2", "llama_mqa_tied_llama3", "mixtral_gqa", "gemma3_gqa_tied"])
def test_it_loads_as_its_directory_does(made: Loader, variant: str) -> None:
    model, directory = made(variant)
    loaded = load_checkpoint("someone/some-name", hf_model=model)
    expected = load_checkpoint(directory)
    assert loaded.cfg == expected.cfg.replace(model_name="some-name")
    assert loaded.tokenizer_source is None
    flat = flatten(loaded.params)
    for path, leaf in flatten(expected.params).items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg=path)


def test_bfloat16_goes_through(made: Loader) -> None:
    import torch

    model, directory = made("llama_mqa_tied_llama3")
    model.to(torch.bfloat16)
    try:
        loaded = HookedTransformer.from_pretrained_no_processing("llama", hf_model=model, dtype="bfloat16")
        stored = load_file(directory / "model.safetensors")
        name = "model.layers.1.self_attn.o_proj.weight"
        expected = stored[name].astype("bfloat16").T.reshape(4, 8, 32)
        np.testing.assert_array_equal(loaded.blocks[1].attn.W_O, expected)
        assert loaded.cfg.model_name == "llama"
    finally:
        model.float()


def test_nothing_is_copied_before_it_is_read(made: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("gpt2")
    _, tensors, _ = read_hf_model(model)
    read = tensors.read("transformer.wte.weight")
    assert read.ctypes.data == model.transformer.wte.weight.data_ptr()
    opened: list[str] = []
    monkeypatch.setattr(reader, "_opened", lambda file: opened.append(file))
    load_checkpoint("gpt2", hf_model=model, fold_ln=False)
    assert not opened


def test_a_directory_gives_the_tokenizer(made: Loader, tmp_path: Path) -> None:
    model, _ = made("gpt2")
    assert load_checkpoint(tmp_path, hf_model=model).tokenizer_source is None
    assert load_checkpoint(MODELS / "tljax-tiny", hf_model=model).tokenizer_source == MODELS / "tljax-tiny"
    assert HookedTransformer.from_pretrained(MODELS / "tljax-tiny", hf_model=model).tokenizer is not None


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for what peft calls
def test_adapters_quantised_and_offloaded_weights_are_refused(made: Loader) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    model, _ = made("gpt2")
    wrapped = peft.get_peft_model(
        AutoModelForCausalLM.from_config(model.config),
        peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True),
    )
    for adapted in (wrapped, wrapped.base_model.model):
        with pytest.raises(InputError, match=r"adapters that are not merged.*merge_and_unload\(\)"):
            load_checkpoint("gpt2", hf_model=adapted)
    assert load_checkpoint("gpt2", hf_model=wrapped.merge_and_unload()).cfg.n_layers == 3
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(UnsupportedModelError, match=r"on the meta device.*without device_map"):
        load_checkpoint("gpt2", hf_model=empty)
    quantised = AutoModelForCausalLM.from_config(model.config)
    quantised.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(
        torch.zeros(32, 128, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match=r"h\.0\.mlp\.c_fc\.weight as Tensor of torch\.int8.*quantised"):
        load_checkpoint("gpt2", hf_model=quantised)


def test_what_is_no_model_is_refused(made: Loader) -> None:
    model, _ = made("gpt2")
    for wrong in ("gpt2", model.state_dict(), object()):
        with pytest.raises(InputError, match=r"hf_model is a .*; expected a transformers model"):
            load_checkpoint("gpt2", hf_model=wrong)
    with pytest.raises(InputError, match=r"revision='main' chooses files, and hf_model= reads none"):
        load_checkpoint("gpt2", hf_model=model, revision="main")


def test_mappings_hold_arrays() -> None:
    tensors = MemoryTensors({"a": np.zeros((2, 3), np.float16), "b": np.zeros(2, np.int64)}, "it")
    assert [(info.dtype, info.shape) for info in tensors.info.values()] == [("F16", (2, 3)), ("int64", (2,))]
    for wrong in ("text", None, [1.0], {"w": 1}, print):
        with pytest.raises(InputError, match=r"it has 'a' as a .*; expected an array"):
            MemoryTensors({"a": wrong}, "it")
    with pytest.raises(InputError, match=r"it has the name 3"):
        MemoryTensors({3: np.zeros(2)}, "it")
