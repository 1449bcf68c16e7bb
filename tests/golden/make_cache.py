"""Makes ``cache_transformerlens.safetensors``: what the methods of TransformerLens 3.9's ``ActivationCache`` give.

``tests/parity/test_cache_methods.py`` reads it. Run it where ``transformer-lens<4`` and torch are installed; it
downloads nothing and always writes the same::

    python tests/golden/make_cache.py

Models and tokens of ``gpt2`` and ``llama`` are those of the golden files that ``make_transformerlens.py`` made;
``gemma2`` has its own, with norms before and after, stored here as ``gemma2:params/name``. Each model runs twice, as it
is and with ``load_and_process_state_dict``. Results are stored as ``case/folded or raw/number of the call``; the
header's ``record`` holds, as JSON, the calls (an argument ``"@name"`` is a tensor, ``"=number"`` the result of another
call), the config of ``gemma2`` and the versions.

TransformerLens takes no account of norms after attention and MLP when it computes what a head or a neuron writes. Its
methods are given those of ``gemma2`` in here: ``hook_result`` and ``hook_post`` divided by the norm's scale in the run,
and the weight of the norm multiplied into ``W_out``. There are no biases, as in Gemma 2.
"""

import copy
import importlib.metadata
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from make_patching import read
from make_transformerlens import SIZES, build, random_parameters
from safetensors.torch import save_file
from transformer_lens import ActivationCache

FOLDER = Path(__file__).parent
PACKAGES = ("transformer-lens", "torch", "safetensors", "numpy")
GEMMA2 = {
    **SIZES, "act_fn": "gelu_pytorch_tanh", "gated_mlp": True, "normalization_type": "RMS", "eps": 1e-6,
    "positional_embedding_type": "rotary", "d_head": 6, "n_key_value_heads": 2,
    "use_normalization_before_and_after": True, "attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0,
}  # fmt: skip

# Method and arguments; the order is that of the stored results.
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("accumulated_resid", {"incl_mid": True, "apply_ln": True}),
    ("accumulated_resid", {"layer": 1, "mlp_input": True, "apply_ln": True, "pos_slice": 2}),
    ("decompose_resid", {}),
    ("decompose_resid", {"layer": 1, "mlp_input": True, "apply_ln": True}),
    ("decompose_resid", {"mode": "mlp", "pos_slice": -1, "apply_ln": True}),
    ("decompose_resid", {"mode": "attn", "incl_embeds": False, "layer": 1}),
    ("stack_activation", {"activation_name": "normalized", "sublayer_type": "ln2"}),
    ("apply_ln_to_stack", {"residual_stack": "=2"}),
    ("apply_ln_to_stack", {"residual_stack": "=2", "layer": 1, "mlp_input": True, "batch_slice": 1}),
    ("stack_head_results", {"incl_remainder": True}),
    ("stack_head_results", {"incl_remainder": True, "apply_ln": True, "pos_slice": [1, 4]}),
    ("stack_head_results", {"layer": 1, "apply_ln": True, "pos_slice": -1}),
    ("get_neuron_results", {"layer": 1, "neuron_slice": [2, 5, 19], "pos_slice": -1}),
    ("get_neuron_results", {"layer": 0, "project_output_onto": "@directions"}),
    ("get_neuron_results", {"layer": 1, "project_output_onto": "@direction", "pos_slice": [0, 3]}),
    ("stack_neuron_results", {"layer": 2, "pos_slice": -1, "incl_remainder": True}),
    ("stack_neuron_results",
     {"layer": 1, "pos_slice": 3, "neuron_slice": [7, 0], "incl_remainder": True, "apply_ln": True}),
    ("stack_neuron_results", {"layer": -1, "project_output_onto": "@direction", "incl_remainder": True}),
    ("stack_neuron_results",
     {"layer": 2, "project_output_onto": "@directions", "incl_remainder": True, "apply_ln": True, "pos_slice": 0}),
    ("get_full_resid_decomposition", {"pos_slice": -1}),
    ("get_full_resid_decomposition", {"expand_neurons": False, "apply_ln": True, "pos_slice": [6, 2]}),
    ("get_full_resid_decomposition", {"layer": 1, "mlp_input": True, "pos_slice": -1, "apply_ln": True}),
    ("get_full_resid_decomposition", {"project_output_onto": "@direction", "apply_ln": True}),
    ("get_full_resid_decomposition", {"layer": 1, "project_output_onto": "@directions", "expand_neurons": False}),
    ("logit_attrs", {"residual_stack": "=2", "tokens": 3}),
    ("logit_attrs", {"residual_stack": "=2", "tokens": "@tokens", "incorrect_tokens": "@wrong"}),
    ("logit_attrs", {"residual_stack": "=19", "tokens": "@last", "pos_slice": -1}),
    ("logit_attrs", {"residual_stack": "=2", "tokens": 5, "incorrect_tokens": 8, "batch_slice": 0}),
]  # fmt: skip
LABELLED = (
    "accumulated_resid", "decompose_resid", "stack_head_results", "stack_neuron_results",
    "get_full_resid_decomposition",
)  # fmt: skip


def gemma2() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and parameters of the model with norms after attention and MLP."""
    params = random_parameters(GEMMA2, 11)
    zeroed = {name for name in params if name.rsplit(".", 1)[-1].lstrip("_").startswith("b")}
    return GEMMA2, {name: torch.zeros_like(value) if name in zeroed else value for name, value in params.items()}


def models(config: dict[str, Any], params: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The model as it is and processed."""
    folded = build(config, None)
    folded.load_and_process_state_dict(
        dict(params), fold_ln=True, center_writing_weights=True, fold_value_biases=True,
        center_unembed=config.get("output_logits_soft_cap", -1.0) <= 0,
    )  # fmt: skip
    return {"raw": build(config, params), "folded": folded.eval()}


def through_norms_after(cache: ActivationCache) -> ActivationCache:
    """A cache whose head results and neurons are what reaches the residual stream."""
    model, kept = copy.deepcopy(cache.model), dict(cache.cache_dict)
    cache.compute_head_results()
    for layer, block in enumerate(model.blocks):
        name = f"blocks.{layer}"
        scale = kept[f"{name}.ln1_post.hook_scale"][..., None]
        kept[f"{name}.attn.hook_result"] = cache["result", layer, "attn"] / scale * block.ln1_post.w
        kept[f"{name}.mlp.hook_post"] = kept[f"{name}.mlp.hook_post"] / kept[f"{name}.ln2_post.hook_scale"]
        block.mlp.W_out.data *= block.ln2_post.w
    return ActivationCache(kept, model)


def call(cache: ActivationCache, method: str, arguments: dict[str, Any], known: dict[str, torch.Tensor]) -> Any:
    """One call's result and, where there are any, its labels."""
    values = {
        name: known[value] if isinstance(value, str) and value[0] in "@=" else value
        for name, value in arguments.items()
    }
    if method not in LABELLED:
        return getattr(cache, method)(**values), None
    return getattr(cache, method)(**values, return_labels=True)


def main() -> None:
    """Writes the file."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)
    _, _, tokens = read("gpt2")
    known = {
        "@direction": torch.randn(SIZES["d_model"], generator=generator),
        "@directions": torch.randn(SIZES["d_model"], 3, generator=generator),
        "@tokens": torch.randint(0, SIZES["d_vocab"], tokens.shape, generator=generator),
        "@wrong": torch.randint(0, SIZES["d_vocab"], tokens.shape, generator=generator),
    }
    known["@last"] = known["@tokens"][:, -1].clone()
    tensors = {name[1:]: value.int() if value.dtype == torch.int64 else value for name, value in known.items()}
    tensors["input"] = tokens.int()
    config, params = gemma2()
    tensors |= {f"gemma2:params/{name}": value for name, value in params.items() if value.any()}
    labels: dict[str, list[str]] = {}
    for case in ("gpt2", "llama", "gemma2"):
        case_config, case_params = (config, params) if case == "gemma2" else read(case)[:2]
        for form, model in models(case_config, case_params).items():
            _, cache = model.run_with_cache(tokens)
            cache = through_norms_after(cache) if case == "gemma2" else cache
            results: dict[str, torch.Tensor] = {}
            for number, (method, arguments) in enumerate(CALLS):
                result, names = call(cache, method, arguments, known | results)
                results[f"={number}"] = result
                tensors[f"{case}/{form}/{number}"] = result.contiguous().clone()
                if names is not None:
                    labels[f"{case}/{number}"] = names
    record = {
        "calls": CALLS, "labels": labels, "gemma2": config, "params": list(params),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }  # fmt: skip
    path = FOLDER / "cache_transformerlens.safetensors"
    save_file(tensors, path, metadata={"record": json.dumps(record, separators=(",", ":"))})
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
