"""Makes ``families/*.safetensors``: whole caches of TransformerLens 3.9 on tiny checkpoints, one file a case.

``tests/parity/test_transformerlens_families.py`` reads them. Run it where ``transformer-lens<4``, torch and
transformers are installed; it downloads nothing and always writes the same::

    python tests/golden/make_families.py

Each case is a random checkpoint of ``tests/hf_models.py`` (or of ``OWN``), which TransformerLens's own loader reads
under one of its official names: ``from_pretrained_no_processing(name, hf_model=…)`` with the lookup of the Hugging
Face config answered by the tiny one. Where the loader takes sizes from the name instead, ``REPLACED`` puts the tiny
checkpoint's in their place; ``CORRECTED`` does so for a constant that differs from what transformers computes.

A file holds the tokens, the logits and every activation, each head's result and the MLP's input included. The header's
``record`` holds, as JSON: the checkpoint's model type and attributes, a fingerprint of its weights, the official name,
the replaced and the corrected fields, the hook names in firing order, how far TransformerLens's logits are from
transformers', and the versions.
"""

import argparse
import importlib.metadata
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from make_transformerlens import Golden
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import hf_models
import transformer_lens.loading_from_pretrained as loading
from fingerprint import fingerprint
from hf_llama_like import GQA, MIXED, SIZES
from transformer_lens import HookedTransformer

TOKENS = [[3, 17, 5, 38, 0, 22, 9, 30]]
PACKAGES = ("transformer-lens", "torch", "transformers", "safetensors")

# Variant → the official name whose path through TransformerLens's loader reads it.
CASES = {
    "gpt2": "gpt2",
    "neox_half_rotary": "EleutherAI/pythia-70m",
    "neox_sequential": "EleutherAI/pythia-70m",
    "llama_mha": "01-ai/Yi-6B",
    "llama_mqa_tied_llama3": "01-ai/Yi-6B",
    "gpt_neo": "EleutherAI/gpt-neo-125M",
    "gptj": "EleutherAI/gpt-j-6B",
    "gpt_bigcode_mqa": "bigcode/santacoder",
    "opt": "facebook/opt-125m",
    "phi": "microsoft/phi-1",
    "phi3_gqa_window": "microsoft/Phi-3-mini-4k-instruct",
    "qwen2_gqa": "Qwen/Qwen2-0.5B",
    "qwen3_gqa": "Qwen/Qwen3-0.6B",
    "mistral_gqa_window": "mistralai/Mistral-7B-v0.1",
    "mixtral_gqa": "mistralai/Mixtral-8x7B-v0.1",
    "gemma_mqa_tied": "google/gemma-2b",
    "gemma2_gqa_tied": "google/gemma-2-2b",
    "gemma3_gqa_tied": "google/gemma-3-270m",
    "gemma3_linear": "google/gemma-3-1b-pt",
    "bloom": "bigscience/bloom-560m",
    "olmo_clipped": "allenai/OLMo-1B-hf",
    "olmo2_mha": "allenai/OLMo-2-0425-1B",
    "olmo3_gqa_window": "allenai/Olmo-3-1025-7B",
    "olmo3_yarn": "allenai/Olmo-3-1025-7B",
    "olmoe_mha": "allenai/OLMoE-1B-7B-0924",
    "apertus_gqa": "swiss-ai/Apertus-8B-2509",
    "gpt_oss_yarn": "openai/gpt-oss-20b",
}

# Checkpoints that no variant of hf_models.py has. TransformerLens 3.9 gives other logits than transformers, without an
# error, for windows in Qwen 2 and 3, linear and YaRN factors in Llama, Phi-3's partial rotation, biases in OLMoE's
# attention, and ALiBi with heads that are no power of two. It cannot load n_inner in GPT-2, grouped heads in OLMo 2 and
# Phi, head_dim in Llama, or OPT and GPT-NeoX without biases.
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 50.0, "beta_fast": 2.0, "beta_slow": 0.1,
        "attention_factor": 1.2, "original_max_position_embeddings": 16}  # fmt: skip
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "neox_half_rotary": ("gpt_neox", hf_models.NEOX | {"rotary_pct": 0.5}),
    "phi3_gqa_window": ("phi3", GQA | {"sliding_window": 6}),
    "qwen2_gqa": ("qwen2", GQA),
    "gemma3_linear": (
        "gemma3_text",
        GQA | {"head_dim": 8, "sliding_window": 6, "layer_types": MIXED, "query_pre_attn_scalar": 8,
               "rope_parameters": {
                   "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
                   "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
               }},
    ),
    "olmo_clipped": ("olmo", SIZES | {"clip_qkv": 0.7}),
    "olmo2_mha": ("olmo2", SIZES),
    "gpt_oss_yarn": (
        "gpt_oss",
        GQA | {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 5,
               "layer_types": MIXED, "rope_parameters": YARN | {"truncate": False}},
    ),
    "olmo3_yarn": (
        "olmo3",
        GQA | {"sliding_window": 6, "layer_types": MIXED,
               "rope_parameters": {"full_attention": YARN,
                                   "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}}},
    ),
}  # fmt: skip


def sizes(hf: Any) -> dict[str, Any]:
    """TransformerLens's config fields that hold sizes, read from a Hugging Face config in Llama's names."""
    d_head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return {
        "d_model": hf.hidden_size, "n_layers": hf.num_hidden_layers, "n_heads": hf.num_attention_heads,
        "d_head": d_head, "rotary_dim": d_head, "d_mlp": hf.intermediate_size, "d_vocab": hf.vocab_size,
        "n_ctx": hf.max_position_embeddings,
    }  # fmt: skip


def gemma_fields(hf: Any) -> dict[str, Any]:
    return sizes(hf) | {"n_key_value_heads": hf.num_key_value_heads}


def gemma2_fields(hf: Any) -> dict[str, Any]:
    kinds = ["local" if kind == "sliding_attention" else "global" for kind in hf.layer_types]
    return gemma_fields(hf) | {
        "attn_types": kinds, "window_size": hf.sliding_window, "attn_scale": hf.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": hf.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": hf.final_logit_softcapping or -1.0,
    }  # fmt: skip


def gemma3_fields(hf: Any) -> dict[str, Any]:
    full, sliding = hf.rope_parameters["full_attention"], hf.rope_parameters["sliding_attention"]
    return gemma2_fields(hf) | {
        "rotary_base": full["rope_theta"], "rotary_base_local": sliding["rope_theta"],
        "rotary_scaling_factor": full.get("factor", 1.0),
    }  # fmt: skip


def olmo_fields(hf: Any) -> dict[str, Any]:
    eps = {"eps": hf.rms_norm_eps} if hf.model_type == "olmo2" else {}
    fields = {"attn_types": ["global"] * hf.num_hidden_layers, "rotary_base": hf.rope_parameters["rope_theta"]}
    return sizes(hf) | fields | eps


# Model type → what its loader knows by name, read from the checkpoint instead.
REPLACED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "gemma": gemma_fields,
    "gemma2": gemma2_fields,
    "gemma3_text": gemma3_fields,
    "olmo": olmo_fields,
    "olmo2": olmo_fields,
}

# Model type → fields in which TransformerLens 3.9 differs from transformers.
CORRECTED: dict[str, dict[str, Any]] = {
    "gemma": {"act_fn": "gelu_pytorch_tanh"},  # it takes "gelu", which transformers reads as this approximation
}


def linear_of(weight: torch.Tensor, bias: torch.Tensor) -> Any:
    """A layer as SantaCoder's own code stores it, ``[in, out]``."""
    return SimpleNamespace(weight=weight.T, bias=bias)


def as_santacoder(model: Any) -> Any:
    """A ``GPTBigCodeForCausalLM`` as the remote code that TransformerLens expects names and stores it."""
    width, layers = model.config.n_embd, []
    for layer in model.transformer.h:
        fused, out, mlp = layer.attn.c_attn, layer.attn.c_proj, layer.mlp
        attn = SimpleNamespace(
            q_attn=linear_of(fused.weight[:width], fused.bias[:width]),
            kv_attn=linear_of(fused.weight[width:], fused.bias[width:]),
            c_proj=linear_of(out.weight, out.bias),
        )
        both = SimpleNamespace(
            c_fc=linear_of(mlp.c_fc.weight, mlp.c_fc.bias), c_proj=linear_of(mlp.c_proj.weight, mlp.c_proj.bias)
        )
        layers.append(SimpleNamespace(ln_1=layer.ln_1, ln_2=layer.ln_2, attn=attn, mlp=both))
    old = model.transformer
    transformer = SimpleNamespace(wte=old.wte, wpe=old.wpe, ln_f=old.ln_f, h=layers)
    return SimpleNamespace(config=model.config, transformer=transformer, lm_head=model.lm_head,
                           parameters=model.parameters, named_parameters=model.named_parameters)  # fmt: skip


def load(model: Any, official_name: str) -> tuple[HookedTransformer, dict[str, Any]]:
    """Loads ``model`` through TransformerLens's own path; returns it and which config fields were put in.

    Raises:
        ValueError: transformers knows the architecture under another name than TransformerLens.
    """
    hf, by_name = model.config, loading.convert_hf_model_config
    if hf.model_type == "gpt2":
        hf.n_ctx = hf.n_positions  # in released files, gone from transformers
    elif hf.model_type == "phi":
        hf.partial_rotary_factor = hf.rope_parameters["partial_rotary_factor"]  # likewise
    elif hf.model_type == "gpt_bigcode":
        hf.architectures, hf.scale_attn_by_inverse_layer_idx = ["GPT2LMHeadCustomModel"], False
        model = as_santacoder(model)
    replaced = REPLACED.get(hf.model_type, lambda _: {})(hf)
    corrected = CORRECTED.get(hf.model_type, {})

    def of_tiny(name: str, **options: Any) -> dict[str, Any]:
        return by_name(name, **options) | replaced | corrected | {"tokenizer_name": None, "trust_remote_code": False}

    with (
        patch.object(loading.AutoConfig, "from_pretrained", lambda *_, **__: hf),
        patch.object(loading, "convert_hf_model_config", of_tiny),
    ):
        loaded = HookedTransformer.from_pretrained_no_processing(official_name, hf_model=model, device="cpu")
    if loaded.cfg.original_architecture not in hf.architectures:
        raise ValueError(f"{official_name} is {loaded.cfg.original_architecture} there, not {hf.architectures[0]}")
    return loaded.eval(), {"replaced": sorted(replaced), "corrected": corrected}


def make(case: str) -> tuple[Golden, dict[str, Any]]:
    """Makes the checkpoint of a case, runs TransformerLens on it; returns its tensors and its record."""
    checkpoint = OWN[case] if case in OWN else hf_models.VARIANTS[case]
    with patch.dict(hf_models.VARIANTS, {case: checkpoint}), tempfile.TemporaryDirectory() as folder:
        model = hf_models.make_hf_model(case, Path(folder))
        weights = fingerprint(Path(folder))
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        expected = model(tokens).logits
        loaded, fields = load(model, CASES[case])
        loaded.set_use_attn_result(True)
        loaded.set_use_hook_mlp_in(True)
        logits, cache = loaded.run_with_cache(tokens)
    golden = Golden()
    golden.put("tokens", tokens)
    golden.put("logits", logits)
    empty = {f"cache/{name}": value for name, value in cache.items() if not value.numel()}  # experts nobody chose
    golden.tensors |= empty
    golden.put_all("cache", {name: value for name, value in cache.items() if value.numel()})
    record = {
        "architecture": type(model).__name__, "official_name": CASES[case], "checkpoint": checkpoint, **fields,
        "fingerprint": weights, "order": list(cache.keys()), "aliases": golden.aliases,
        "logits_minus_transformers": float((logits - expected).abs().max()),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }  # fmt: skip
    return golden, record


def main() -> None:
    """Writes one safetensors file for each case asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(CASES)}; none means all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "families", help="folder to write to")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for case in arguments.cases or CASES:
        golden, record = make(case)
        path = arguments.out / f"{case}.safetensors"
        save_file(golden.tensors, path, metadata={"record": json.dumps(record, separators=(",", ":"))})
        difference, size = record["logits_minus_transformers"], path.stat().st_size / 1e3
        print(f"{path.name}: {len(record['order'])} hooks, {size:.0f} kB, logits {difference:.1e} from transformers'")


if __name__ == "__main__":
    main()
