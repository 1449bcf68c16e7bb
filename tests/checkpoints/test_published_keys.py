"""What published files say is read as transformers reads it; every promised name leads to a file that can be read."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from published_keys import LLAMA, OTHERS, PROMISED, Keys
from test_class_defaults import read

from tljax.checkpoints.description import describe
from tljax.checkpoints.files.names import ALIASES, IN_TRANSFORMER_LENS_FORM
from tljax.errors import CheckpointError, InputError, TljaxError, UnsupportedModelError

ALL = dict(PROMISED) | OTHERS


@pytest.mark.parametrize("name", ALL)
def test_a_published_file_means_what_transformers_makes_of_it(name: str) -> None:
    from transformers import CONFIG_MAPPING

    keys = ALL[name]
    config = CONFIG_MAPPING[keys["model_type"]].from_dict(copy.deepcopy(keys))
    assert read(keys) == read(config.to_dict() | {"architectures": keys.get("architectures")})


def test_every_promised_name_leads_to_a_file_that_can_be_read() -> None:
    repos = set(ALIASES.values()) - IN_TRANSFORMER_LENS_FORM.keys()  # those are in tests/checkpoints/test_hosted.py
    matching = {repo: [pattern for pattern, _ in PROMISED if re.fullmatch(pattern, repo)] for repo in repos}
    assert not {repo: patterns for repo, patterns in matching.items() if len(patterns) != 1}
    assert {patterns[0] for patterns in matching.values()} == {pattern for pattern, _ in PROMISED}


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        (r"facebook/opt-(13b|30b|66b)", {"output_projection": False}, "output_projection"),
        (r"google/gemma-2-.*", {"sliding_window_size": 2048}, "sliding_window_size"),
        (r"google/gemma-2-.*", {"hidden_activation": "gelu"}, "hidden_activation"),
        (r"EleutherAI/gpt-neo-.*|roneneldan/TinyStories-.*", {"rotary": True}, "rotary"),
        ("Nemotron", {"kv_channels": 64}, "kv_channels"),
        ("Phi-4-mini", {"full_attn_mod": 2}, "full_attn_mod"),
        ("Phi-4-mini", {"interpolate_factor": 4}, "interpolate_factor"),
        ("Qwen3 Coder", {"qkv_bias": True}, "qkv_bias"),
        ("Qwen3 Coder", {"use_qk_norm": False}, "use_qk_norm"),
        ("Qwen3 Coder", {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size"),
        ("Command R7B", {"layer_switch": 2}, "layer_switch"),
        ("Command R7B", {"_sliding_window_pattern": 2}, "_sliding_window_pattern"),
        ("StarCoder2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("HunYuan", {"use_cla": True}, "use_cla"),
        ("HunYuan", {"norm_type": "layer"}, "norm_type"),
        ("HunYuan", {"attention_head_dim": 64}, "attention_head_dim"),
        ("HunYuan", {"use_rotary_pos_emb": False}, "use_rotary_pos_emb"),
        ("HunYuan", {"add_classification_head": True}, "add_classification_head"),
        ("Falcon 7B", {"ff_factor": 2}, "ff_factor"),
        ("a test's GPT-BigCode", {"attention_type": 1}, "attention_type"),
        ("Command R", {"auto_map": {"AutoModelForCausalLM": "someone/else--modeling_mine.Cohere"}}, "code of its own"),
        ("a fine-tuned Llama", {"is_causal": False}, "is_causal"),
        ("a fine-tuned Llama", {"quantization": {"bits": 4}}, "Quantized"),
    ],
)
def test_inert_at_the_published_value_alone(name: str, change: Keys, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        read(ALL[name] | change)


@pytest.fixture
def described(tmp_path: Path) -> Callable[..., Any]:
    def write_and_read(attributes: dict[str, Any], *ignore: str) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(attributes))
        return describe(tmp_path, ignore)

    return write_and_read


def test_an_unknown_key_can_be_ignored_by_name(described: Callable[..., Any], tmp_path: Path) -> None:
    plain = described(LLAMA).cfg
    with pytest.raises(UnsupportedModelError, match=r'alibi=8.*it changes nothing.*ignore_config=\["alibi"\]'):
        described(LLAMA | {"alibi": 8})
    assert described(LLAMA | {"alibi": 8}, "alibi").cfg == plain
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"alibi": 8}))
    assert describe(tmp_path, "alibi").cfg == plain
    assert described(LLAMA | {"rope_theta": 5e5}, "rope_theta").cfg == plain  # read, so the class's default is taken
    mpt = OTHERS["MPT 7B"]
    odd = mpt | {"attn_config": mpt["attn_config"] | {"odd": 1}}
    with pytest.raises(UnsupportedModelError, match=r'attn_config sets odd=1.*ignore_config=\["attn_config.odd"\]'):
        described(odd)
    assert described(odd, "attn_config.odd").cfg == described(mpt).cfg


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ("rope_theto", r"'rope_theto', which .*config.json does not have. Did you mean 'rope_theta'"),
        ("hidden_size", r"'hidden_size', which says what model this is"),
        ("model_type", r"cannot be ignored"),
        ("architectures", r"cannot be ignored"),
    ],
)
def test_what_cannot_be_ignored(described: Callable[..., Any], ignore: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        described(LLAMA | {"rope_theta": 1e4, "hidden_size": 4096}, ignore)


@pytest.mark.parametrize(
    ("architectures", "model_type", "found"),
    [
        (["LLaMAForCausalLM"], "llama", "LlamaForCausalLM"),
        (["LlamaModel"], "llama", "LlamaForCausalLM"),
        (["Unheard", "LlamaForCausalLM"], "llama", "LlamaForCausalLM"),
        (["OwnForCausalLM"], "llama", "LlamaForCausalLM"),
        (None, "llama", "LlamaForCausalLM"),
        (["LlamaForCausalLM"], None, "LlamaForCausalLM"),
        (["LlamaForSequenceClassification"], "llama", "another head than LlamaForCausalLM's"),
        (["LlamaForCausalLMEagle3"], "llama", "another head"),
        (["LlavaForConditionalGeneration"], "llava", "does not implement"),
        (["LlamaForCausalLM"], "gpt2", "contradicts itself"),
        ("LlamaForCausalLM", "llama", "expected a list of names"),
        ([["LlamaForCausalLM"]], "llama", "expected a list of names"),
        ([], 7, "does not implement"),
    ],
)
def test_which_family(described: Callable[..., Any], architectures: Any, model_type: Any, found: str) -> None:
    attributes = {"architectures": architectures, "model_type": model_type}
    if found.endswith("ForCausalLM"):
        assert described(attributes).cfg.original_architecture == found
    else:
        with pytest.raises(TljaxError, match=found):
            described(attributes)


@pytest.mark.parametrize("size", [10**7, 2**31, 10**30, 0, -4, True, "32", 32.0, [32], {}, float("nan")], ids=str)
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads"])
def test_a_size_that_is_none_is_refused_at_once(described: Callable[..., Any], name: str, size: Any) -> None:
    if name == "num_attention_heads" and size == 10**7:  # only the tensors can tell
        size = -1
    with pytest.raises(CheckpointError, match=rf"{name}=.*: expected"):
        described(LLAMA | {name: size})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "[" * 100000 + "]" * 100000 + "}", "too deeply"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"model_type": "llama", "auto_map": 5}', "auto_map=5: expected an object"),
        ('{"model_type": "llama", "rope_scaling": "linear"}', "rope_scaling='linear': expected an object"),
        ('{"model_type": "llama", "tie_word_embeddings": "false"}', "tie_word_embeddings='false': expected true or"),
        ('{"model_type": "gpt_neo", "attention_types": [[["global"], 2000000000]]}', "2000000000 layers"),
        ('{"model_type": "gemma3_text", "sliding_window_pattern": 0}', "does not describe a model"),
        ('{"model_type": "xglm", "max_position_embeddings": 1000000000}', "max_position_embeddings=1000000000"),
    ],
)
def test_odd_files_are_refused_at_once(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TljaxError, match=message):
        describe(tmp_path)
