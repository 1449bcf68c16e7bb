"""Checkpoints, adapters and configs that cannot be loaded as they are."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from table import Case, World

from tljax import HookedTransformer
from tljax.checkpoints.description import describe
from tljax.errors import (
    CheckpointError,
    ConfigError,
    FrozenModelError,
    InputError,
    UnsupportedModelError,
)

CASES: tuple[Case, ...] = ()


def _rewritten(directory: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    """Changes the tensors of a checkpoint that tljax saved, which then looks like one without checksums."""
    file, config = Path(directory, "model.safetensors"), Path(directory, "config.json")
    save_file(change(load_file(file)), file)
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({key: fields[key] for key in fields.keys() - {"tljax_checksum", "tljax_weights"}}))


# Text towers, wrapped names, biases of gated MLPs


def _renamed(w: World, rename: Callable[[str], str]) -> HookedTransformer:
    """The small model, saved and loaded again with other names for its tensors."""
    with tempfile.TemporaryDirectory() as directory:
        w.small.save_pretrained(directory)
        _rewritten(directory, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
        return HookedTransformer.from_pretrained_no_processing(directory)


def _described(**attributes: Any) -> Any:
    """The config of a directory with this config.json."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "sliding_window": 4}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(whole | attributes))
        return describe(Path(directory)).cfg


_LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
_MISTRAL3 = {
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
    "text_config": {"model_type": "ministral3"},
}  # fmt: skip
CASES += (
    Case(
        "saved from DataParallel inside torch.compile",
        lambda w: _renamed(w, lambda name: f"_orig_mod.module.{name}").params["embed"]["W_E"],
        equals=lambda w: w.small.params["embed"]["W_E"],
        tolerance=0.0,
    ),
    Case(
        "two state dicts mixed, one of them from DataParallel",
        lambda w: _renamed(w, lambda name: f"module.{name}" if "attn" in name else name),
        CheckpointError,
        "is wrapped in part",
        "module.blocks.0.attn",
        "model.module",
    ),
    Case(
        "a prefix on the block's names alone",
        lambda w: _renamed(w, lambda name: name.replace("blocks.", "net.blocks.")),
        CheckpointError,
        "unexpected: net.blocks.0",
        "missing: blocks.0",
    ),
    Case("gated biases without a gate", lambda w: w.config(gated_mlp_bias=True), ConfigError, "set gated_mlp"),
    Case("a Gemma 3 with images", lambda w: _described().n_heads, equals=8),
    Case(
        "a multimodal config without its text model",
        lambda w: _described(text_config=None),
        CheckpointError,
        "text_config=None",
        "expected the attributes",
    ),
    Case(
        "an unknown attribute beside text_config",
        lambda w: _described(memory_tokens=4),
        UnsupportedModelError,
        "memory_tokens=4",
    ),
    Case(
        "an unknown attribute in text_config",
        lambda w: _described(text_config={"memory_tokens": 4}),
        UnsupportedModelError,
        "(text_config) sets memory_tokens=4",
    ),
    Case("a text model of another kind", lambda w: _described(**_MISTRAL3), UnsupportedModelError, "'ministral3'"),
    Case("a multimodal model that tljax has not", lambda w: _described(**_LLAVA), UnsupportedModelError, "LlavaFor"),
)


# Keys of config.json


def _config(name: str, change: dict[str, Any], error: type[Exception], *says: str, **options: Any) -> Case:
    """A config.json of a Llama with these changes, and no weights beside it."""

    def load(_: Any) -> HookedTransformer:
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "config.json").write_text(json.dumps(_LLAMA | change))
            return HookedTransformer.from_pretrained(directory, **options)

    return Case(name, load, error, *says)


_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
CASES += (
    _config("an unknown key", {"odd": 1}, UnsupportedModelError, "odd=1", 'ignore_config=["odd"]'),
    _config("an unknown key, ignored", {"odd": 1}, CheckpointError, "has no weights", ignore_config="odd"),
    _config("ignoring a key that is not there", {"odd": 1}, InputError, "'od'", "'odd'", ignore_config=["od"]),
    _config("ignoring a size", {"hidden_size": 64}, InputError, "cannot be ignored", ignore_config=["hidden_size"]),
    _config("ten million layers", {"num_hidden_layers": 10**7}, CheckpointError, "num_hidden_layers=", "10,000"),
    _config("a vocabulary of 10**12", {"vocab_size": 10**12}, CheckpointError, "vocab_size=1000000000000"),
    _config("a size that is true", {"hidden_size": True}, CheckpointError, "hidden_size=True", "an integer"),
    _config("a switch in words", {"attention_bias": "false"}, CheckpointError, "'false'", "true or false"),
    _config("a reward model", {"architectures": ["LlamaForReward"]}, UnsupportedModelError, "another head"),
    _config("two families", {"model_type": "gpt2"}, CheckpointError, "contradicts itself", "GPT2LMHeadModel"),
    _config("attention that sees what comes", {"is_causal": False}, UnsupportedModelError, "is_causal=False"),
)


# Adapters, NaN and overflow


def _adapted(w: World, config: dict[str, Any] | str, **options: Any) -> HookedTransformer:
    """The small model from a directory with an adapter beside it, of this config and without tensors."""
    with tempfile.TemporaryDirectory() as directory:
        w.small.save_pretrained(directory)
        text = config if isinstance(config, str) else json.dumps({"peft_type": "LORA"} | config)
        Path(directory, "adapter_config.json").write_text(text)
        save_file({}, Path(directory, "adapter_model.safetensors"))
        return HookedTransformer.from_pretrained_no_processing(directory, **options)


def _with_number(w: World, number: float, **options: Any) -> HookedTransformer:
    """The small model, saved and loaded again with another number in ``W_in``."""
    with tempfile.TemporaryDirectory() as directory:
        w.small.save_pretrained(directory)

        def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            tensors["blocks.0.mlp.W_in"][1, 2] = number
            return tensors

        _rewritten(directory, change)
        return HookedTransformer.from_pretrained_no_processing(directory, **options)


CASES += (
    Case("an adapter without tensors", lambda w: _adapted(w, {}), CheckpointError, "holds no tensors"),
    Case("an adapter beside, left out", lambda w: _adapted(w, {}, adapter=False).cfg.d_model, equals=8),
    Case("a prompt as adapter", lambda w: _adapted(w, {"peft_type": "PROMPT_TUNING"}), UnsupportedModelError, "PROMPT"),
    Case("a classifier's adapter", lambda w: _adapted(w, {"task_type": "SEQ_CLS"}), UnsupportedModelError, "head"),
    Case("PiSSA", lambda w: _adapted(w, {"init_lora_weights": "pissa"}), UnsupportedModelError, "were changed"),
    Case("an activated adapter", lambda w: _adapted(w, {"alora_invocation_tokens": [1]}), UnsupportedModelError,
         "only after"),
    Case("an adapter's new key", lambda w: _adapted(w, {"use_x": 1}), UnsupportedModelError, "use_x=1",
         "ignore_adapter"),
    Case("an adapter's rank in words", lambda w: _adapted(w, {"r": "eight"}), CheckpointError, "r='eight'", "int"),
    Case("a true rank", lambda w: _adapted(w, {"r": True}), CheckpointError, "r=True"),
    Case("half an adapter config", lambda w: _adapted(w, '{"r": 8'), CheckpointError, "not valid JSON"),
    Case("two adapters", lambda w: w.tiny.from_pretrained("tljax-tiny", adapter=["a/b", "c/d"]), InputError,
         "one adapter"),
    Case("adapter=True", lambda w: w.tiny.from_pretrained("tljax-tiny", adapter=True), InputError, "or False for none"),
    Case("a model as adapter", lambda w: w.tiny.from_pretrained("tljax-tiny", adapter="tljax-tiny"), CheckpointError,
         "has no adapter_config.json", "first argument"),
    Case("a NaN weight", lambda w: _with_number(w, float("nan")), CheckpointError, "W_in holds 1 NaN", "[1, 2]"),
    Case("an infinite weight", lambda w: _with_number(w, float("inf")), CheckpointError, "1 infinite",
         "allow_nonfinite"),
    Case("float16 overflows", lambda w: _with_number(w, 1e6, dtype="float16"), CheckpointError, "blocks.0.mlp.W_in",
         "1e+06", "65504", "bfloat16"),
    Case("overflow on demand", lambda w: _with_number(w, 1e6, dtype="float16", allow_nonfinite=True).W_in[0, 1, 2],
         equals=float("inf")),
)  # fmt: skip


# TransformerLens's own form, and models in memory


def _lens(w: World, drop: str = "", state: Any = None, **fields: Any) -> HookedTransformer:
    """Loads the small model in TransformerLens's form, with a tensor left out, others added, or other fields."""
    attn, mlp = w.small.blocks[0].attn, w.small.blocks[0].mlp
    own: dict[str, Any] = {"embed.W_E": w.small.W_E, "pos_embed.W_pos": w.small.W_pos}
    own |= {f"blocks.0.attn.{x}_{y}": getattr(attn, f"{x}_{y}") for x in "Wb" for y in "QKVO"}
    own |= {f"blocks.0.mlp.{x}_{y}": getattr(mlp, f"{x}_{y}") for x in "Wb" for y in ("in", "out")}
    own |= {"unembed.W_U": w.small.W_U, "unembed.b_U": w.small.b_U}
    own = {name: value for name, value in (own | (state or {})).items() if name != drop}
    cfg = {name: getattr(w.small.cfg, name) for name in ("d_model", "d_head", "n_heads", "n_layers", "n_ctx", "d_mlp")}
    cfg |= {"d_vocab": 12, "act_fn": "relu", "normalization_type": None}
    return HookedTransformer.from_transformer_lens(own, {k: v for k, v in (cfg | fields).items() if v != "absent"})


_load = HookedTransformer.from_transformer_lens
CASES += (
    Case("TransformerLens's form", lambda w: _lens(w)([[1, 2, 3]]), equals=lambda w: w.small([[1, 2, 3]])),
    Case("its buffers", lambda w: _lens(w, state={"blocks.0.attn.IGNORE": np.float32(-np.inf)}).cfg.n_ctx, equals=4),
    Case("a bias left out", lambda w: _lens(w, "blocks.0.attn.b_Q"), CheckpointError, "1 missing: blocks.0.attn.b_Q"),
    Case(
        "a tensor too many",
        lambda w: _lens(w, state={"blocks.1.attn.b_O": np.zeros(8)}),
        CheckpointError,
        "1 unexpected: blocks.1.attn.b_O [8]",
        "its cfg describes",
    ),
    Case("another width", lambda w: _lens(w, d_mlp=16), CheckpointError, "W_in is [8, 32], cfg says [8, 16]"),
    Case(
        "a norm in cfg alone",
        lambda w: _lens(w, normalization_type="LN"),
        CheckpointError,
        "normalization_type='LNPre'",
    ),
    Case(
        "weights as integers",
        lambda w: _lens(w, state={"embed.W_E": np.zeros((12, 8), np.int8)}),
        UnsupportedModelError,
        "embed.W_E as int8",
    ),
    Case("a list for a tensor", lambda w: _lens(w, state={"embed.W_E": [[1.0]]}), InputError, "'embed.W_E' as a list"),
    Case("a misspelt field", lambda w: _lens(w, n_key_value_head=1), ConfigError, "Did you mean 'n_key_value_heads'"),
    Case(
        "a field of a later version",
        lambda w: _lens(w, per_layer_head_dim=4),
        ConfigError,
        "'per_layer_head_dim'",
        "3.9",
    ),
    Case("no d_model", lambda w: _lens(w, d_model="absent"), ConfigError, "cfg lacks d_model", "to_dict()"),
    Case("no d_vocab", lambda w: _lens(w, d_vocab=-1), ConfigError, "no d_vocab"),
    Case(
        "4-bit weights", lambda w: _lens(w, load_in_4bit=True), UnsupportedModelError, "load_in_4bit", "full precision"
    ),
    Case("T5's positions", lambda w: _lens(w, relative_attention_num_buckets=32), UnsupportedModelError, "T5"),
    Case(
        "log-n attention",
        lambda w: _lens(w, use_logn_attn=True, train_seq_length=2),
        UnsupportedModelError,
        "use_logn_attn",
    ),
    Case(
        "alibi of three heads",
        lambda w: _lens(w, positional_embedding_type="alibi", n_heads=3),
        UnsupportedModelError,
        "n_heads=3",
        "power of two",
    ),
    Case(
        "a model instead of its state",
        lambda w: _load(w.small, w.small.cfg),
        InputError,
        "HookedTransformer",
        "model.state_dict()",
    ),
    Case("cfg left out of the call", lambda w: _load({}, None), InputError, "cfg is a NoneType", "to_dict()"),
    Case("a file that is not there", lambda w: _load("no.pth", w.small.cfg), CheckpointError, "no.pth is not a file"),
    Case(
        "load_state_dict",
        lambda w: w.small.load_state_dict({}),
        FrozenModelError,
        "from_transformer_lens(state_dict, cfg)",
    ),
    Case(
        "hf_model by name",
        lambda w: HookedTransformer.from_pretrained("gpt2", hf_model="gpt2"),
        InputError,
        "hf_model is a str",
        "transformers model",
    ),
    Case(
        "shortformer positions beyond the table",
        lambda w: HookedTransformer(w.config(positional_embedding_type="shortformer"))([[1] * 5]),
        InputError,
        "n_ctx=4",
    ),
)
