"""Makes the golden file of TransformerLens 3.9's own form that ``tests/checkpoints/test_transformer_lens.py`` reads.

Run it where ``transformer-lens<4`` and torch are installed. It downloads nothing and always writes the same::

    python tests/golden/make_state_dicts.py

Each case is a tiny model whose every parameter is random, norm weights and biases included: its whole ``state_dict()``
(buffers too) as ``case/state/name``, and the logits of :func:`tokens` as ``case/logits``. The header's ``record`` holds
``cfg.to_dict()`` of each case as JSON, and the versions. ``shortformer`` also has activations, ``case/run/hook``.
"""

import importlib.metadata
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

BATCH, POS, VOCAB = 2, 6, 24
SIZES = {"d_model": 8, "n_layers": 1, "n_ctx": 8, "n_heads": 2, "d_head": 6, "d_mlp": 10, "d_vocab": VOCAB}
ROTARY = {"positional_embedding_type": "rotary"}
RMS = {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "n_key_value_heads": 2, "n_heads": 4, **ROTARY}
JOINT = {"n_heads": 4, "d_head": 2}  # 3.9's joint norms of queries are d_model wide

CASES: dict[str, dict[str, Any]] = {
    "ln": {"act_fn": "gelu_new", "n_layers": 2},
    "folded": {"act_fn": "gelu_new"},
    "gqa": RMS,
    "gqa_folded": RMS,
    "attn_only": {"attn_only": True, "act_fn": None},
    "shortformer": {"positional_embedding_type": "shortformer", "act_fn": "relu", "n_layers": 2},
    "shortformer_attn_only": {"positional_embedding_type": "shortformer", "attn_only": True, "act_fn": None},
    "solu_ln": {"act_fn": "solu_ln", "d_vocab_out": 21},
    "solu_ln_folded": {"act_fn": "solu_ln"},
    "neox": {"act_fn": "gelu", "parallel_attn_mlp": True, **ROTARY, "rotary_dim": 4},
    "alibi": {"act_fn": "gelu_fast", "positional_embedding_type": "alibi", "post_embedding_ln": True},
    "xielu": {"act_fn": "xielu"},
    "norm_none": {"act_fn": "relu2", "normalization_type": None, "use_attn_scale": False},
    "mixtral": {**RMS, "num_experts": 4, "experts_per_token": 2, "norm_topk_prob": True},
    "olmoe": {
        **RMS, **JOINT, "n_key_value_heads": None, "num_experts": 3, "experts_per_token": 2, "clip_qkv": 0.5,
        "original_architecture": "OlmoeForCausalLM",
    },
    "olmo2": {**RMS, **JOINT, "n_key_value_heads": None, "original_architecture": "Olmo2ForCausalLM"},
    "olmo3": {
        **RMS, **JOINT, "original_architecture": "Olmo3ForCausalLM", "use_local_attn": True, "window_size": 3,
        "attn_types": ["local", "global"], "n_layers": 2, "use_yarn_rope": True, "yarn_factor": 2.0,
        "yarn_original_max_position_embeddings": 4, "yarn_global_attn_only": True,
    },
    "gemma3": {
        **RMS, "use_normalization_before_and_after": True, "use_qk_norm": True, "act_fn": "gelu_pytorch_tanh",
        "attn_scores_soft_cap": 3.0, "output_logits_soft_cap": 4.0, "rotary_base_local": 30.0, "use_local_attn": True,
        "window_size": 3, "attn_types": ["local", "global"], "n_layers": 2, "rotary_scaling_factor": 2.0,
    },
    "gpt_oss": {
        **RMS, "num_experts": 4, "experts_per_token": 2, "use_attention_sinks": True,
        "original_architecture": "GptOssForCausalLM",
    },
}  # fmt: skip
FOLDED = ("folded", "gqa_folded", "solu_ln_folded")
KEPT = {
    "plain": ("embed", "normalized", "hook_q", "hook_k", "hook_v", "pattern", "resid_mid", "resid_post"),
    "left": ("pos_embed", "hook_k", "pattern", "resid_post"),
    "apart": ("hook_attn_in", "1.hook_k_input", "1.attn.hook_q", "1.attn.hook_k", "1.attn.hook_v", "resid_post"),
}
"""Points of each run that are stored, by how their names end."""
SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in")


def tokens() -> torch.Tensor:
    """``[batch, pos]``, the same in every case."""
    return (torch.arange(BATCH * POS).reshape(BATCH, POS) * 7 + 3) % VOCAB


def made(case: str) -> HookedTransformer:
    """The model of a case."""
    cfg = HookedTransformerConfig(**{**SIZES, **CASES[case], "device": "cpu", "init_weights": False})
    model = HookedTransformer(cfg)
    generator = torch.Generator().manual_seed(sorted(CASES).index(case))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            width = parameter.shape[-1] if parameter.ndim else 1
            scale = 0.3 if parameter.ndim < 2 else 1.5 / width**0.5
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(drawn + (1.0 if name.endswith(".w") else 0.0))
    if case in FOLDED:
        model.process_weights_()
    return model


def plain(value: Any) -> Any:
    """A config's value as JSON has it."""
    if value is None or isinstance(value, bool | int | str):
        return value
    return [plain(entry) for entry in value] if isinstance(value, list) else str(value) if isinstance(
        value, torch.dtype
    ) else float(value)  # fmt: skip


def caches(model: HookedTransformer) -> dict[str, dict[str, torch.Tensor]]:
    """Activations of a shortformer: as it is, padded on the left, and with queries, keys and values read apart."""
    padding = torch.ones(BATCH, POS, dtype=torch.int64)
    padding[0, :2] = 0
    runs = {"plain": model.run_with_cache(tokens())[1].cache_dict}
    runs["left"] = model.run_with_cache(tokens(), attention_mask=padding)[1].cache_dict
    for switch in SWITCHES:
        setattr(model.cfg, switch, True)
    model.set_use_attn_result(True)
    runs["apart"] = model.run_with_cache(tokens())[1].cache_dict
    return {run: {name: cache[name] for name in cache if name.endswith(KEPT[run])} for run, cache in runs.items()}


def main() -> None:
    """Writes the file."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    tensors: dict[str, torch.Tensor] = {"tokens": tokens()}
    record: dict[str, Any] = {
        "cfg": {}, "versions": {name: importlib.metadata.version(name) for name in ("transformer-lens", "torch")}
    }  # fmt: skip
    for case in CASES:
        model = made(case)
        record["cfg"][case] = {key: plain(value) for key, value in model.cfg.to_dict().items()}
        tensors |= {f"{case}/state/{key}": value.clone().contiguous() for key, value in model.state_dict().items()}
        with torch.no_grad():
            tensors[f"{case}/logits"] = model(tokens())
            runs = caches(model) if case == "shortformer" else {}
        for run, cache in runs.items():
            tensors |= {f"{case}/{run}/{name}": value.clone().contiguous() for name, value in cache.items()}
    path = Path(__file__).parent / "state_dicts_transformerlens.safetensors"
    save_file(tensors, path, {"record": json.dumps(record)})


if __name__ == "__main__":
    main()
