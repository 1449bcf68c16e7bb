"""LoRA adapters merged on load: peft's own numbers, every way to name one, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from compare import same_bits
from fingerprint import fingerprint, same
from hf_models import rewrite
from hub_server import Hub, serve
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tljax import HookedTransformer
from tljax.checkpoints import load_checkpoint
from tljax.checkpoints.layout import flatten
from tljax.errors import CheckpointError, InputError, UnsupportedModelError

GOLDEN = Path(__file__).parents[1] / "golden" / "adapters"
RAW: dict[str, Any] = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}
with safe_open(GOLDEN / "expected.safetensors", "np") as file:
    EXPECTED = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    RECORD = json.loads(file.metadata()["record"])
CASES = RECORD["cases"]
Checkpoints = Callable[[str], Path]


def load(name: Any, **options: Any) -> dict[str, np.ndarray]:
    """A checkpoint's unprocessed parameters by path."""
    return {path: np.asarray(leaf) for path, leaf in flatten(load_checkpoint(name, **RAW, **options).params).items()}


def changed(
    target: Path,
    case: str = "rslora_conv1d",
    tensors: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict,
    **config: Any,
) -> Path:
    """Copies a golden adapter with its tensors or its config changed; returns ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    attributes = json.loads((GOLDEN / case / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(attributes | config))
    save_file(tensors(load_file(GOLDEN / case / "adapter_model.safetensors")), target / "adapter_model.safetensors")
    return target


def beside(base: Path, target: Path, **config: Any) -> Path:
    """A directory with the checkpoint ``base`` and an adapter of GPT-2."""
    return changed(rewrite(base, target), **config)


# Numbers


@pytest.mark.parametrize("case", CASES)
def test_logits_are_peft_s(case: str, hf_checkpoint: Checkpoints) -> None:
    base = hf_checkpoint(CASES[case])
    assert same(fingerprint(base), RECORD["bases"][CASES[case]])
    model = HookedTransformer.from_pretrained_no_processing(base, adapter=GOLDEN / case)
    np.testing.assert_allclose(model(EXPECTED["tokens"]), EXPECTED[case], atol=2e-4, rtol=0)


def test_processing_comes_after_the_merge(hf_checkpoint: Checkpoints) -> None:
    model = HookedTransformer.from_pretrained(hf_checkpoint("gpt2"), adapter=GOLDEN / "rslora_conv1d")
    assert model.processing["fold_ln"] == "applied"
    np.testing.assert_allclose(
        jax.nn.log_softmax(model(EXPECTED["tokens"])), jax.nn.log_softmax(EXPECTED["rslora_conv1d"]), atol=1e-4, rtol=0
    )


def test_an_untrained_adapter_changes_no_bit(gpt2: Path, tmp_path: Path) -> None:
    def zeros(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ends = ("lora_B.weight", "lora_embedding_A")
        return {key: np.zeros_like(value) if key.endswith(ends) else value for key, value in tensors.items()}

    same_bits(load(gpt2, adapter=changed(tmp_path, tensors=zeros)), load(gpt2))


def test_bfloat16_is_rounded_once(gpt2: Path, tmp_path: Path) -> None:
    whole = load(gpt2, adapter=GOLDEN / "rslora_conv1d", dtype="bfloat16")
    for path, leaf in load(gpt2, adapter=GOLDEN / "rslora_conv1d").items():
        np.testing.assert_array_equal(whole[path], leaf.astype("bfloat16"), err_msg=path)


def test_the_first_layers_take_their_part_of_an_adapter(gpt2: Path) -> None:
    whole = load(gpt2, adapter=GOLDEN / "rslora_conv1d")
    part = load(gpt2, adapter=GOLDEN / "rslora_conv1d", first_n_layers=1)
    same_bits(part, {path: whole[path] for path in part})


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: f"module.{key}",
    ],
    ids=["bare", "named", "compiled", "parallel"],
)
def test_tensors_go_by_other_names(rename: Callable[[str], str], gpt2: Path, tmp_path: Path) -> None:
    renamed = changed(tmp_path, tensors=lambda tensors: {rename(key): value for key, value in tensors.items()})
    same_bits(load(gpt2, adapter=renamed), load(gpt2, adapter=GOLDEN / "rslora_conv1d"))


def test_whole_modules_go_by_other_names(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    def doubled(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = "base_model.model.model.embed_tokens"
        table = tensors[f"{name}.weight"]
        copies = {f"{name}.modules_to_save.default.weight": table, f"{name}.original_module.weight": table + 1}
        return tensors | copies

    base = hf_checkpoint("llama_mqa_tied_llama3")
    adapter = changed(tmp_path, "tied_whole_embedding", doubled)
    same_bits(load(base, adapter=adapter), load(base, adapter=GOLDEN / "tied_whole_embedding"))


def test_a_base_stored_without_its_prefix_takes_the_same_adapter(gpt2: Path, tmp_path: Path) -> None:
    bare = rewrite(gpt2, tmp_path, lambda ts: {key.removeprefix("transformer."): value for key, value in ts.items()})
    same_bits(load(bare, adapter=GOLDEN / "tied_head"), load(gpt2, adapter=GOLDEN / "tied_head"))


# Names


def test_an_adapter_alone_finds_its_base(gpt2: Path, tmp_path: Path) -> None:
    alone = changed(tmp_path / "tuned", base_model_name_or_path=str(gpt2))
    loaded = load_checkpoint(alone, **RAW)
    assert loaded.cfg.model_name == f"{gpt2.name}+tuned"
    same_bits(load(alone), load(gpt2, adapter=GOLDEN / "rslora_conv1d"))


def test_an_adapter_beside_a_checkpoint_is_merged_as_in_transformers_or_left_out_on_demand(
    gpt2: Path, tmp_path: Path
) -> None:
    both = beside(gpt2, tmp_path / "both", base_model_name_or_path="no/such")
    assert load_checkpoint(both).cfg.model_name == "both+adapter"
    same_bits(load(both), load(gpt2, adapter=GOLDEN / "rslora_conv1d"))
    same_bits(load(both, adapter=both), load(both))
    same_bits(load(both, adapter=False), load(gpt2))
    with pytest.raises(InputError, match=r"has an adapter of its own .* is another"):
        load(both, adapter=GOLDEN / "rslora_conv1d")
    (both / "adapter_model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"neither adapter_model.safetensors nor .* adapter=False loads without it"
    ):
        load(both)


def test_a_pickled_adapter(gpt2: Path, tmp_path: Path) -> None:
    import torch

    adapter = changed(tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    same_bits(load(gpt2, adapter=adapter), load(gpt2, adapter=GOLDEN / "rslora_conv1d"))


def test_the_tokenizer_is_the_adapter_s_if_it_has_one(gpt2: Path, tmp_path: Path) -> None:
    both = rewrite(gpt2, tmp_path / "base")
    (both / "tokenizer.json").write_text("{}")
    adapter = changed(tmp_path / "adapter")
    assert load_checkpoint(both, adapter=adapter, **RAW).tokenizer_source == both
    (adapter / "tokenizer.json").write_text("{}")
    assert load_checkpoint(both, adapter=adapter, **RAW).tokenizer_source == adapter


def test_adapters_on_the_hub(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def files(directory: Path, **more: bytes) -> dict[str, bytes]:
        return {entry.name: entry.read_bytes() for entry in directory.iterdir()} | more

    tuned = files(changed(tmp_path / "a", base_model_name_or_path="team/base", revision="v1"))
    other = files(changed(tmp_path / "b", "tied_head", base_model_name_or_path="team/base"))
    merged = files(gpt2) | tuned
    hub = Hub(
        repos={
            "team/base": {"v1": files(gpt2)},
            "team/tuned": {"main": tuned, "late": other},
            "team/both": {"main": merged | {"pytorch_model.bin": b"no"}},
        }
    )
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache"}
    with serve(hub, monkeypatch):
        expected = load(gpt2, adapter=GOLDEN / "rslora_conv1d")
        same_bits(load("team/tuned", **options), expected)  # its base at the revision that it names
        assert load_checkpoint("team/tuned", **options).cfg.model_name == "base+tuned"
        same_bits(load(gpt2, adapter="team/tuned", **options), expected)
        late = load(gpt2, adapter="team/tuned", adapter_revision="late", **options)
        same_bits(late, load(gpt2, adapter=GOLDEN / "tied_head"))
        same_bits(load(gpt2, adapter="team/both", **options), expected)
        fetched = [path for method, path, _ in hub.requests if method == "GET" and "/team/both/" in path]
        assert not any(path.endswith(("model.safetensors", ".bin")) and "adapter" not in path for path in fetched)
        with pytest.raises(
            UnsupportedModelError, match=r"weights and an adapter .* adapter=False .* adapter='team/both'"
        ):
            load("team/both", **options)
        same_bits(load("team/both", adapter=False, **options), load(gpt2))
        hub.repos["team/base"] = {"v2": files(gpt2)}
        with pytest.raises(CheckpointError, match=r"names the base 'team/base': .*from_pretrained\(base, adapter"):
            load("team/tuned", cache_dir=tmp_path / "other")


# Refusals


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type='IA3'.*merge_and_unload"),
        ({"peft_type": "ADALORA"}, "peft_type='ADALORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'.*another head"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens.*only after certain tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"kasa_config": {"beta": 1.0}, "arrow_config": {"top_k": 1}}, "arrow_config=.*; kasa_config="),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"some_new_key": 3, "another": "x"}, r"some_new_key=3, another='x'.*does not know.*ignore_adapter_config"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_adapters_of_other_kinds_are_refused_by_name(config: dict[str, Any], message: str, gpt2: Path, tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match=message):
        load(gpt2, adapter=changed(tmp_path, **config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"r": 4},
            r"26 wrong: .*c_attn.lora_A.weight is \[3, 32\], expected \[4, 32\].*c_attn.lora_B.weight is \[96, 3\]",
        ),
        ({"r": "3"}, "r='3', expected int"),
        ({"r": 0}, "rank 0"),
        ({"rank_pattern": {"h.0.(": 3}}, "no regular expression"),
        ({"alpha_pattern": {"c_fc": "2"}}, r"alpha_pattern\['c_fc'\]='2'"),
        ({"use_dora": True}, "c_attn has lora_A and lora_B, expected lora_A and lora_B and lora_magnitude_vector"),
        ({"use_rslora": "yes"}, "use_rslora='yes', expected bool"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_the_tensors_contradict(config: dict[str, Any], message: str, gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(gpt2, adapter=changed(tmp_path, **config))


def test_an_unknown_key_may_be_passed_over(gpt2: Path, tmp_path: Path) -> None:
    adapter = changed(tmp_path, some_new_key=3)
    known = load(gpt2, adapter=GOLDEN / "rslora_conv1d")
    same_bits(load(gpt2, adapter=adapter, ignore_adapter_config=["some_new_key"]), known)
    with pytest.raises(InputError, match=r"no 'some_new_kei' to ignore. Did you mean 'some_new_key'"):
        load(gpt2, adapter=adapter, ignore_adapter_config=["some_new_kei"])


def test_everything_that_does_not_fit_is_said_at_once(gpt2: Path, tmp_path: Path) -> None:
    def spoilt(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        block = "base_model.model.transformer.h."
        del tensors[f"{block}0.attn.c_proj.lora_B.weight"]
        tensors[f"{block}1.mlp.c_fc.lora_A.weight"] = np.zeros((3, 31), np.float32)
        tensors[f"{block}2.attn.q_proj.lora_A.weight"] = np.zeros((3, 32), np.float32)
        tensors[f"{block}7.mlp.c_fc.lora_A.weight"] = np.zeros((3, 32), np.float32)
        tensors[f"{block}2.mlp.c_fc.lora_B.weight"] = np.zeros((128, 3), np.int32)
        tensors[f"{block}0.ln_1.weight"] = np.zeros(5, np.float32)
        return tensors

    with pytest.raises(CheckpointError) as caught:
        load(gpt2, adapter=changed(tmp_path, tensors=spoilt))
    message = str(caught.value)
    for part in (
        "2 without a place in the base", "h.2.attn.q_proj.lora_A.weight [3, 32]", "h.7.mlp.c_fc.lora_A.weight",
        "1 not stored as numbers", "h.2.mlp.c_fc.lora_B.weight (I32)",
        "h.0.attn.c_proj has lora_A, expected lora_A and lora_B",
        "h.1.mlp.c_fc.lora_A.weight is [3, 31], expected [3, 32]",
        "h.0.ln_1.weight is [5], but transformer.h.0.ln_1.weight is [32]", "its base is 'gpt2'", "Nothing was loaded",
    ):  # fmt: skip
        assert part in message


def test_a_module_without_any_tensor(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    def without(part: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        return lambda tensors: {key: value for key, value in tensors.items() if part not in key}

    for case, part in (
        ("fused_whole_head", "lm_head"),
        ("fused_whole_head", "attention.dense"),
        ("rslora_conv1d", "wpe"),
    ):
        adapter = changed(tmp_path / part, case, without(part))
        with pytest.raises(CheckpointError, match=f"1 of its modules without a tensor: {part.rpartition('.')[2]}\n"):
            load(hf_checkpoint(CASES[case]), adapter=adapter)
    adapter = changed(tmp_path / "tokens", "tied_tokens", without("tokens"))
    with pytest.raises(CheckpointError, match="without a tensor: trainable_token_indices"):
        load(hf_checkpoint(CASES["tied_tokens"]), adapter=adapter)


def test_dora_of_a_row_of_zeros(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    def zero(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for key in tensors:
            if "h.1.mlp.c_proj" in key and "lora_B" in key:
                tensors[key][5] = 0
        return tensors

    def zero_base(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["transformer.h.1.mlp.c_proj.weight"][:, 5] = 0
        return tensors

    base = rewrite(hf_checkpoint("gpt2_untied"), tmp_path / "base", zero_base)
    with pytest.raises(CheckpointError, match=r"output 5 of transformer.h.1.mlp.c_proj is zero"):
        load(base, adapter=changed(tmp_path / "adapter", "dora_conv1d_embedding", zero))


def test_an_adapter_of_another_model(hf_checkpoint: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit this base(?s:.*)27 without a place(?s:.*)base is 'gpt2'"):
        load(hf_checkpoint("neox"), adapter=GOLDEN / "lora_bias_conv1d")


def test_contradictory_copies_and_rows(hf_checkpoint: Checkpoints, tmp_path: Path) -> None:
    tied = hf_checkpoint("llama_mqa_tied_llama3")
    name = "base_model.model.model.embed_tokens"

    def copy(ts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return ts | {f"{name}.modules_to_save.weight": ts[f"{name}.weight"] + 1}

    with pytest.raises(CheckpointError, match=r"both replace model.embed_tokens.weight, and differ"):
        load(tied, adapter=changed(tmp_path, "tied_whole_embedding", copy))
    with pytest.raises(CheckpointError, match=r"is \[2, 32\], expected \[3, 32\] for the 3 trainable_token_indices"):
        load(tied, adapter=changed(tmp_path, "tied_tokens", trainable_token_indices=[1, 5, 6]))
    with pytest.raises(CheckpointError, match=r"has 99, but model.embed_tokens.weight has 40 rows"):
        load(tied, adapter=changed(tmp_path, "tied_tokens", trainable_token_indices=[1, 99]))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_number_that_is_none_in_an_adapter(bad: float, gpt2: Path, tmp_path: Path) -> None:
    def spoilt(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"][4, 1] = bad
        return tensors

    adapter = changed(tmp_path, tensors=spoilt)
    with pytest.raises(CheckpointError, match=r"h.1.attn.c_attn.lora_B.weight holds 1 .* at \[4, 1\].*allow_nonfinite"):
        load(gpt2, adapter=adapter)
    assert not np.isfinite(load(gpt2, adapter=adapter, allow_nonfinite=True)["blocks.1.attn.W_Q"]).all()


def test_what_is_no_adapter(gpt2: Path, tmp_path: Path) -> None:
    for wrong in (True, 3, [GOLDEN / "rslora_conv1d"]):
        with pytest.raises(InputError, match=r"expected the directory or hub id of one adapter.*save_hf"):
            load(gpt2, adapter=wrong)
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json.*a whole model is the first argument"):
        load(gpt2, adapter=gpt2)
    with pytest.raises(InputError, match="adapter_revision= goes with adapter="):
        load(gpt2, adapter_revision="main")
    alone = changed(tmp_path / "alone", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"does not say which model.*from_pretrained\(base, adapter"):
        load(alone)
    with pytest.raises(InputError, match="nothing to load with adapter=False"):
        load(alone, adapter=False)
    shutil.copytree(alone, tmp_path / "chain")
    with pytest.raises(UnsupportedModelError, match="which holds an adapter itself"):
        load(changed(tmp_path / "chain", base_model_name_or_path=str(alone)))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load(gpt2, adapter=changed(tmp_path / "empty", tensors=lambda _: {}))
