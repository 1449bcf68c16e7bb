"""Makes ``adapters/``: LoRA adapters as peft saves them, on tiny checkpoints, with the logits of peft's own model.

``tests/checkpoints/test_adapters.py`` reads them. Run it where peft, torch and transformers are installed; it downloads
nothing and always writes the same::

    python tests/golden/make_adapters.py

Each case is an adapter of a random checkpoint of ``tests/hf_models.py``, with every trained number random, in a
directory of its own. ``adapters/expected.safetensors`` holds the tokens and each case's logits, from peft's model with
the adapter loaded and not merged; its ``record`` says which checkpoint, with a fingerprint of its weights, and the
versions.
"""

import importlib.metadata
import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import hf_models
from fingerprint import fingerprint

OUT = Path(__file__).parent / "adapters"
TOKENS = [[3, 17, 5, 38, 0, 22, 9, 30]]
MORE_TOKENS = 3
PACKAGES = ("peft", "torch", "transformers", "safetensors")

# Case → the checkpoint, and peft's settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns_and_biases": (
        "llama_gqa_bias",
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"], "bias": "all",
         "rank_pattern": {"v_proj": 1, "layers.1.mlp.down_proj": 2, r"^model.layers.\d.self_attn.o_proj": 4},
         "alpha_pattern": {r"layers.[02].self_attn.q_proj": 9, "proj": 6}, "layers_to_transform": [0, 1]},
    ),
    "rslora_conv1d": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_proj", "c_fc", "wpe"], "use_rslora": True}),
    "lora_bias_conv1d": (
        "gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"], "lora_bias": True, "fan_in_fan_out": True}
    ),
    "fused_whole_head": (
        "neox",
        {"r": 2, "target_modules": ["query_key_value", "dense"], "modules_to_save": ["lm_head", "final_layer_norm"]},
    ),
    "fused_dora": ("falcon_mqa", {"r": 2, "target_modules": ["query_key_value", "dense_4h_to_h"], "use_dora": True}),
    "dora_conv1d_embedding": ("gpt2_untied", {"r": 2, "target_modules": ["c_attn", "c_proj", "wte"], "use_dora": True}),
    "tied_embedding": ("llama_mqa_tied_llama3", {"r": 2, "target_modules": ["up_proj", "embed_tokens"]}),
    "tied_head": ("gpt2", {"r": 2, "target_modules": ["c_fc", "lm_head"]}),
    "tied_whole_embedding": (
        "llama_mqa_tied_llama3", {"r": 2, "target_modules": ["gate_proj"], "modules_to_save": ["embed_tokens"]}
    ),
    "tied_tokens": ("llama_mqa_tied_llama3", {"r": 2, "target_modules": ["k_proj"], "trainable_token_indices": [1, 5]}),
    "more_tokens": ("llama_mha", {"r": 2, "target_modules": ["q_proj"]}),
    "all_experts": (
        "gpt_oss_gqa",
        {"r": 1, "target_modules": ["q_proj"], "alpha_pattern": {"experts.down_proj": 3},
         "target_parameters": ["1.mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "experts": ("mixtral_gqa", {"r": 1, "target_modules": ["q_proj", "gate"]}),
}  # fmt: skip


def base_of(case: str, directory: Path) -> Any:
    """The checkpoint of a case; one with more tokens than it was saved with, where the case is about that."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    if case == "more_tokens":
        model.resize_token_embeddings(model.config.vocab_size + MORE_TOKENS, mean_resizing=False)
    return model


def split_experts(directory: Path, n_experts: int, width: int, hidden: int) -> None:
    """Adds adapters of one layer's experts, named as where each expert is a module of its own (transformers 4)."""
    tensors = load_file(directory / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for expert in range(n_experts):
        for name, (inputs, outputs) in {"w1": (hidden, width), "w2": (width, hidden), "w3": (hidden, width)}.items():
            module = f"base_model.model.model.layers.1.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(1, inputs, generator=generator)
            tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(outputs, 1, generator=generator)
    named = {re.sub(r"\.mlp\.gate\.", ".block_sparse_moe.gate.", key): tensor for key, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"target_modules": ["q_proj", "gate", "w1", "w2", "w3"], "target_parameters": None}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))


def make(case: str, checkpoint: Path, directory: Path) -> torch.Tensor:
    """Writes the adapter of a case and returns the logits of peft's model that has loaded it."""
    _, settings = CASES[case]
    torch.manual_seed(0)
    model = get_peft_model(base_of(case, checkpoint), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or (case == "more_tokens" and ("embed_tokens" in name or "lm_head" in name)):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    if case == "experts":
        attributes = model.config
        split_experts(directory, attributes.num_local_experts, attributes.intermediate_size, attributes.hidden_size)
    loaded = PeftModel.from_pretrained(base_of(case, checkpoint), directory).eval()
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = CASES[case][0]
    config["target_modules"] = sorted(config["target_modules"])  # peft keeps a set
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    with torch.no_grad():
        return loaded(torch.tensor(TOKENS)).logits


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    shutil.rmtree(OUT, ignore_errors=True)
    logits, bases = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for case, (variant, _) in CASES.items():
            checkpoint = Path(folder) / variant
            if not checkpoint.exists():
                checkpoint.mkdir()
                hf_models.make_hf_model(variant, checkpoint)
            logits[case] = make(case, checkpoint, OUT / case)
            bases[variant] = fingerprint(checkpoint)
            print(case, f"{float(logits[case].abs().max()):.3g}")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    cases = {case: variant for case, (variant, _) in CASES.items()}
    record = json.dumps({"cases": cases, "bases": bases, "versions": versions})
    save_file({"tokens": torch.tensor(TOKENS), **logits}, OUT / "expected.safetensors", {"record": record})


if __name__ == "__main__":
    main()
