"""Names that something put a prefix on: one prefix on all is left off, anything else is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from compare import same_bits
from hf_models import rewrite
from hf_towers import make_tower

from tljax.checkpoints import Loaded, load_checkpoint
from tljax.errors import CheckpointError

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
Tensors = dict[str, np.ndarray]


def load_raw(directory: Path) -> Loaded:
    return load_checkpoint(directory, **RAW)


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("variant", ["gpt2", "llama_mqa_tied_llama3", "qwen3_moe_gqa"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model.", "_forward_module.model."])
def test_a_prefix_of_all_names_is_left_off(
    prefix: str, variant: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = hf_checkpoint(variant)
    same_bits(load_raw(rewrite(source, tmp_path, prefixed(prefix))).params, load_raw(source).params)


def test_a_bare_model_may_be_wrapped_and_so_may_a_multimodal_one(
    hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = hf_checkpoint("llama_mqa_tied_llama3")
    bare = rewrite(source, tmp_path / "bare", lambda t: {name.removeprefix("model."): t[name] for name in t})
    same_bits(load_raw(rewrite(bare, tmp_path / "wrapped", prefixed("module."))).params, load_raw(source).params)
    make_tower("qwen2_vl", tmp_path / "tower")
    wrapped = rewrite(tmp_path / "tower", tmp_path / "compiled", prefixed("_orig_mod."))
    same_bits(load_raw(wrapped).params, load_raw(tmp_path / "tower").params)


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (
            lambda name: name if name.startswith("lm_head") else f"module.{name}",
            r"in part.*have none \(lm_head",
        ),
        (
            lambda name: f"{'module' if '.0.' in name else '_orig_mod'}.{name}",
            r"in part.*not all have the same",
        ),
        (lambda name: f"module.{name}" if name.startswith("lm_head") else name, r"begin with .*\(module\.lm_head"),
        (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), r"unexpected: model\.layers\.1\._orig_mod\."),
        (lambda name: f"a.{name}" if "layers.0" in name else f"b.{name}", r"unexpected: [ab]\.model\."),
    ],
)
def test_other_prefixes_are_refused(
    wrap: Callable[[str], str], says: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = hf_checkpoint("llama_gqa_bias")
    broken = rewrite(source, tmp_path, lambda tensors: {wrap(name): tensors[name] for name in tensors})
    with pytest.raises(CheckpointError, match=says):
        load_raw(broken)


def test_a_name_with_and_without_the_prefix_is_refused(hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    twice = {"norm.weight": np.zeros(32, np.float32)}
    with pytest.raises(CheckpointError, match=r"1 unexpected: norm\.weight"):
        load_raw(rewrite(hf_checkpoint("llama_gqa_bias"), tmp_path, lambda tensors: tensors | twice))


@pytest.mark.parametrize(
    ("variant", "embedding"),
    [("gpt2", "transformer.wte.weight"), ("llama_mqa_tied_llama3", "model.embed_tokens.weight")],
)
def test_a_tied_checkpoint_may_store_the_head_alone(
    variant: str, embedding: str, hf_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """As transformers reads it; the other way round is how it writes."""
    import torch
    from transformers import AutoModelForCausalLM

    source = hf_checkpoint(variant)

    def head_alone(tensors: Tensors) -> Tensors:
        return {"lm_head.weight" if name == embedding else name: tensor for name, tensor in tensors.items()}

    directory = rewrite(source, tmp_path, head_alone)
    same_bits(load_raw(directory).params, load_raw(source).params)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).get_input_embeddings().weight
    np.testing.assert_array_equal(load_raw(directory).params["embed"]["W_E"], theirs.detach().numpy())


def test_equal_tensors_stored_twice_are_no_contradiction(
    hf_checkpoint: Callable[[str], Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    source = hf_checkpoint("gpt2")
    twice = rewrite(source, tmp_path, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"]})
    same_bits(load_raw(twice).params, load_raw(source).params)
    assert not recwarn.list
