"""Text models of multimodal checkpoints: transformers' logits, both published layouts, the fate of every attribute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import same_bits
from hf_models import rewrite
from hf_towers import IMAGE, TEXT, TOWERS, make_tower, new_names, old_names
from safetensors.numpy import load_file

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.checkpoints import Loaded, load_checkpoint
from tljax.checkpoints.description import describe
from tljax.checkpoints.families import TEXT_ARCHITECTURES
from tljax.checkpoints.families import towers as families
from tljax.checkpoints.files.names import hub_id
from tljax.checkpoints.formats.export import save_hf
from tljax.errors import CheckpointError, UnsupportedModelError

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
PROMPTS = np.random.default_rng(3).integers(2, 48, (2, 12)).astype(np.int32)
PROMPTS[1, 4] = IMAGE  # without pixels an id like any other
LLAVA = ("gemma3", "mistral3")
EACH = pytest.mark.parametrize("model_type", TOWERS)
Made = Callable[[str], tuple[Path, Any, Loaded]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint of a model type: its directory, transformers' logits, and what tljax loads."""
    known: dict[str, tuple[Path, Any, Loaded]] = {}

    def get(model_type: str) -> tuple[Path, Any, Loaded]:
        if model_type not in known:
            directory = tmp_path_factory.mktemp(model_type)
            logits = logits_of(make_tower(model_type, directory))
            known[model_type] = directory, logits, load_checkpoint(directory, **RAW)
        return known[model_type]

    return get


def logits_of(torch_model: Any, prompts: np.ndarray = PROMPTS) -> np.ndarray:
    import torch

    with torch.no_grad():
        return torch_model(input_ids=torch.tensor(prompts, dtype=torch.int64)).logits.numpy()


def describe_config(directory: Path, attributes: dict[str, Any]) -> HookedTransformerConfig:
    (directory / "config.json").write_text(json.dumps(attributes))
    return describe(directory).cfg


@EACH
def test_logits_of_text_are_those_of_transformers(model_type: str, made: Made) -> None:
    _, expected, loaded = made(model_type)
    np.testing.assert_allclose(HookedTransformer(loaded.cfg, params=loaded.params)(PROMPTS), expected, atol=5e-5)
    assert loaded.cfg.original_architecture in TEXT_ARCHITECTURES


@EACH
def test_both_layouts_are_the_same_checkpoint(model_type: str, made: Made, tmp_path: Path) -> None:
    directory, _, loaded = made(model_type)
    same_bits(load_checkpoint(rewrite(directory, tmp_path / "new", new_names), **RAW).params, loaded.params)
    old = rewrite(directory, tmp_path / "old", lambda tensors: old_names(tensors, model_type in LLAVA))
    start = "language_model.model.layers.0." if model_type in LLAVA else "model.layers.0."
    assert any(name.startswith(start) for name in load_file(old / "model.safetensors"))
    same_bits(load_checkpoint(old, **RAW).params, loaded.params)


@EACH
def test_the_text_model_is_written_as_one_of_its_own(model_type: str, made: Made, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, expected, loaded = made(model_type)
    save_hf(loaded.params, loaded.cfg, tmp_path)
    written = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    assert type(written).__name__ == TEXT_ARCHITECTURES[loaded.cfg.original_architecture or ""]
    np.testing.assert_allclose(logits_of(written), expected, atol=5e-5)
    same_bits(load_checkpoint(tmp_path, **RAW).params, loaded.params)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_flat_configs_of_old_are_read(model_type: str, made: Made, tmp_path: Path) -> None:
    directory, _, loaded = made(model_type)

    def flat(config: dict[str, Any]) -> dict[str, Any]:
        """As Qwen published them: no ``text_config``, an older ``rope_scaling``, one more id."""
        text = config.pop("text_config") | {"model_type": model_type}
        rope = text.pop("rope_parameters")
        theta = rope.pop("rope_theta")
        scaling = rope if rope["rope_type"] == "yarn" else {"type": "mrope", "mrope_section": [1, 1, 2]}
        layers = {"layer_types": None, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 28}
        return config | text | layers | {"rope_theta": theta, "rope_scaling": scaling, "vision_token_id": 54}

    again = load_checkpoint(rewrite(directory, tmp_path, config=flat), **RAW)
    assert again.cfg.replace(model_name="") == loaded.cfg.replace(model_name="")
    same_bits(again.params, loaded.params)


def test_qwen3_s_experts_as_published(made: Made, tmp_path: Path) -> None:
    """With the input axis first; transformers 5 writes it last."""
    directory, _, loaded = made("qwen3_vl_moe")
    turned = {"count": 0}

    def turn(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [name for name in tensors if ".experts." in name]
        turned["count"] = len(names)
        return tensors | {name: np.ascontiguousarray(tensors[name].swapaxes(1, 2)) for name in names}

    same_bits(load_checkpoint(rewrite(directory, tmp_path, turn), **RAW).params, loaded.params)
    assert turned["count"] == 4


# Gemma 3 as published: most of the text model's attributes are absent

GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "vision_use_head": False},
}  # fmt: skip
SPARSE = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (
            {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
            {"n_heads": 8, "kv_heads": 4, "d_head": 256, "attn_scale": 16.0},
        ),
        (
            {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
             "num_key_value_heads": 8},
            {"n_heads": 16, "kv_heads": 8, "d_head": 256, "attn_scale": 16.0},
        ),
        (
            {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
             "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168},
            {"n_heads": 32, "kv_heads": 16, "d_head": 128, "attn_scale": 168**0.5},
        ),
    ],
)  # fmt: skip
def test_gemma_3_of_4b_12b_and_27b(text: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    cfg = describe_config(tmp_path, GEMMA3 | {"text_config": SPARSE | text})
    assert {name: getattr(cfg, name) for name in fields} == fields
    assert (cfg.d_vocab, cfg.n_ctx, cfg.window_size, cfg.rotary_scaling_factor) == (262208, 131072, 1024, 8.0)
    assert (cfg.rotary_base, cfg.rotary_base_local, cfg.act_fn) == (1e6, 1e4, "gelu_pytorch_tanh")
    assert cfg.attn_types is not None
    assert cfg.attn_types[:6] == ("local",) * 5 + ("global",)


def test_a_sparse_gemma_3_gives_transformers_logits(tmp_path: Path) -> None:
    import torch
    from transformers import Gemma3ForConditionalGeneration

    text = SPARSE | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6, "sliding_window": 4}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 28, "patch_size": 14, "vision_use_head": False}  # fmt: skip
    model = make_tower("gemma3", tmp_path, 0.1, text_config=text, vision_config=vision)
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3 | {"text_config": text, "vision_config": vision}))
    again = Gemma3ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    loaded = load_checkpoint(tmp_path, **RAW)
    prompts = PROMPTS[:, :8]
    expected = logits_of(again, prompts)
    np.testing.assert_allclose(logits_of(model, prompts), expected, atol=1e-6)
    np.testing.assert_allclose(HookedTransformer(loaded.cfg, params=loaded.params)(prompts), expected, atol=5e-5)


@pytest.mark.parametrize("size", ["4b", "12b", "27b"])
def test_names(size: str) -> None:
    assert hub_id(f"gemma-3-{size}-it") == f"google/gemma-3-{size}-it"
    assert hub_id(f"gemma-3-{size}-pt") == hub_id(f"gemma-3-{size}") == f"google/gemma-3-{size}-pt"


@pytest.mark.parametrize("family", families.TOWERS, ids=lambda family: family.model_type)
def test_defaults_are_those_of_transformers(family: Any) -> None:
    from transformers import AutoConfig

    whole = AutoConfig.for_model(family.model_type)
    theirs = type(whole.text_config)().to_dict()  # what it takes for keys that a text_config lacks
    theirs |= {"rope_theta": theirs["rope_parameters"].get("rope_theta"), "head_dim": theirs.get("head_dim")}
    # not in the config: how its model computes; and under another name
    theirs |= {"partial_rotary_factor": 1.0, "norm_topk_prob": True}
    theirs |= {"num_experts": theirs.get("num_experts", theirs.get("num_local_experts"))}
    for name, value in family.defaults.items():
        if name != "tie_word_embeddings":  # of the whole config, below
            assert value == theirs[name], name
    assert whole.tie_word_embeddings == family.tower.tied


# What is left out, and what is refused


def test_tensors_of_neither_text_nor_images_are_refused(made: Made, tmp_path: Path) -> None:
    directory, _, _ = made("qwen3_vl")
    extra = {"model.audio.conv.weight": np.zeros(3, np.float32)}
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.audio\.conv\.weight \[3\]"):
        load_checkpoint(rewrite(directory, tmp_path, lambda tensors: tensors | extra))
    twice = "model.layers.0.input_layernorm.weight"
    with pytest.raises(
        CheckpointError, match=r"stores model\.layers\.0\.input_layernorm\.weight twice, as model\.lang"
    ):
        load_checkpoint(rewrite(directory, tmp_path, lambda tensors: tensors | {twice: np.ones(32, np.float32)}))


def test_a_text_tensor_that_is_missing_is_named(made: Made, tmp_path: Path) -> None:
    directory, _, _ = made("gemma3")
    lost = "language_model.model.layers.1.mlp.up_proj.weight"
    broken = rewrite(directory, tmp_path, lambda tensors: {name: tensors[name] for name in tensors if name != lost})
    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_checkpoint(broken)


def whole_config(model_type: str, text: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A config of ``TOWERS`` without ``architectures``, with changes to the whole and to the text model's part."""
    attributes = TOWERS[model_type] | {"model_type": model_type}
    return attributes | {"text_config": attributes["text_config"] | (text or {})} | changes


@pytest.mark.parametrize(
    ("attributes", "error", "named"),
    [
        (whole_config("gemma3", looks_back=3), UnsupportedModelError, r"config\.json sets looks_back=3"),
        (whole_config("gemma3", {"looks_back": 3}), UnsupportedModelError, r"\(text_config\) sets looks_back=3"),
        (whole_config("qwen3_vl", attention_chunks=3), UnsupportedModelError, r"sets attention_chunks=3"),
        (
            whole_config("qwen3_vl", {"use_sliding_window": True}),
            UnsupportedModelError,
            r"use_sliding_window=True.*supported: False",
        ),
        (whole_config("mistral3", {"model_type": "ministral3"}), UnsupportedModelError, r"model_type='ministral3'"),
        (whole_config("gemma3", text_config=None), CheckpointError, r"text_config=None: expected the attributes"),
        (whole_config("glm4v", text_config="text"), CheckpointError, r"text_config='text': expected"),
        (
            whole_config("mistral3", {"quantization_config": None}, quantization_config={"bits": 4}),
            UnsupportedModelError,
            r"quantization_config=.*full-precision",
        ),
        (
            whole_config("qwen2_vl", {"rope_parameters": {"rope_type": "spiral"}}),
            UnsupportedModelError,
            r"rope_type='spiral'",
        ),
    ],
)
def test_what_could_change_the_numbers_is_refused(
    attributes: dict[str, Any], error: type[Exception], named: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=named):
        describe_config(tmp_path, attributes)


def test_attributes_beside_text_config_do_not_reach_the_text_model(tmp_path: Path) -> None:
    """As in transformers: some of its versions wrote both, and not always alike."""
    expected = describe_config(tmp_path, whole_config("qwen2_5_vl"))
    copies = {name: 7 for name in TEXT if name not in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert describe_config(tmp_path, whole_config("qwen2_5_vl", **copies)) == expected
    of_images = {"image_token_id": 9, "video_token_id": None, "vision_start_token_id": 3, "vision_config": {}}
    assert describe_config(tmp_path, whole_config("qwen2_5_vl", of_images)) == expected


def test_glm_4v_was_flat_once_too(tmp_path: Path) -> None:
    """Transformers 5 no longer reads such a file: it takes its class's sizes."""
    nested = whole_config("glm4v")
    flat = nested | nested["text_config"] | {"text_config": None}
    assert describe_config(tmp_path, flat) == describe_config(tmp_path, nested)


@pytest.mark.parametrize(
    ("model_type", "of_whole", "of_text", "tied"),
    [
        ("gemma3", None, False, True),
        ("gemma3", False, True, False),
        ("mistral3", None, None, True),
        ("qwen2_vl", None, True, True),
        ("qwen2_vl", None, None, False),
        ("qwen3_vl", None, True, False),
        ("qwen3_vl", True, None, True),
        ("glm4v", False, True, True),
    ],
)
def test_who_ties_the_embeddings(
    model_type: str, of_whole: bool | None, of_text: bool | None, tied: bool, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    attributes = whole_config(model_type, {"tie_word_embeddings": of_text}, tie_word_embeddings=of_whole)
    for part in (attributes, attributes["text_config"]):
        if part["tie_word_embeddings"] is None:
            del part["tie_word_embeddings"]
    describe_config(tmp_path, attributes)
    head = next(row for row in describe(tmp_path).rows if row.key == "lm_head.weight")
    assert (head.tied_to is not None) is tied is AutoConfig.from_pretrained(tmp_path).tie_word_embeddings
