"""Makes the golden files of TransformerLens 3.9 that ``tests/parity/test_transformerlens.py`` reads.

Run it where ``transformer-lens<4`` and torch are installed. It downloads nothing and always writes the same::

    python tests/golden/make_transformerlens.py

Each case is a tiny model whose every parameter is random, norm weights and biases included. Its file holds
the parameters under TransformerLens's names and shapes, and several *runs* of them as ``run/hook name``. The
header's ``record`` says, as JSON: the config in tljax's field names, the versions, and for every run what was
asked for and the hook names in the order in which they fired. A tensor within 2e-6 of one that is already
there is not stored again; ``aliases`` points at it.
"""

import argparse
import importlib.metadata
import json
import logging
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

State = Mapping[str, torch.Tensor]

BATCH, POS, VOCAB = 2, 7, 50
NO_PARAMETER = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
SIZES = {"d_model": 12, "n_layers": 2, "n_ctx": 10, "n_heads": 4, "d_head": 4, "d_mlp": 20, "d_vocab": VOCAB}
ROTARY = {"positional_embedding_type": "rotary"}

# Config fields beyond SIZES, in tljax's (and TransformerLens's) names.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"act_fn": "gelu_new"},
    "llama": {
        "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "eps": 1e-6, **ROTARY,
        "d_head": 6, "n_key_value_heads": 2, "rotary_base": 500.0,
    },
    "neox": {"act_fn": "gelu", "parallel_attn_mlp": True, **ROTARY, "d_head": 8, "rotary_dim": 4},
    "gptj": {
        "act_fn": "gelu_new", "parallel_attn_mlp": True, **ROTARY,
        "d_head": 6, "rotary_dim": 4, "rotary_adjacent_pairs": True,
    },
    "attn_only": {"attn_only": True, "act_fn": None, "d_mlp": None, "scale_attn_by_inverse_layer_idx": True},
    "solu_ln": {"act_fn": "solu_ln"},
    "softcaps": {
        "act_fn": "gelu_pytorch_tanh", "normalization_type": "RMS", "gated_mlp": True, **ROTARY,
        "attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0,
    },
    "bidirectional": {
        "act_fn": "gelu_fast", "attention_dir": "bidirectional", "use_attn_scale": False, "d_vocab_out": 53,
    },
    "local": {
        "act_fn": "relu2", "use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"],
    },
    "norm_none": {"act_fn": "relu", "normalization_type": None},
    "mqa_ntk": {
        "act_fn": "relu", "normalization_type": "RMS", **ROTARY, "n_key_value_heads": 1,
        "use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 16, "rotary_base": 50.0,
    },
    "ln_gated_final_rms": {
        "act_fn": "solu", "gated_mlp": True, "final_rms": True, **ROTARY, "rotary_scaling_factor": 2.0,
    },
    "qk_norm": {
        "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "eps": 1e-4, **ROTARY, "d_head": 6,
        "n_key_value_heads": 2, "use_qk_norm": True,
    },
    "rotary_local": {
        "act_fn": "gelu", **ROTARY, "use_local_attn": True, "window_size": 3, "attn_types": ["global", "local"],
        "rotary_base": 900.0, "rotary_base_local": 30.0, "rotary_scaling_factor": 2.0,
    },
    "mixtral": {
        "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "eps": 1e-5, **ROTARY, "d_head": 6,
        "n_key_value_heads": 2, "num_experts": 4, "experts_per_token": 2, "norm_topk_prob": True,
    },
}  # fmt: skip

# Optional hook points, run by run.
SWITCHES: dict[str, dict[str, dict[str, bool]]] = {
    "gpt2": {
        "result_mlp_in": {"use_attn_result": True, "use_hook_mlp_in": True, "use_hook_tokens": True},
        "split_qkv": {"use_split_qkv_input": True},
        "attn_in": {"use_attn_in": True},
        "attn_in_split_qkv": {"use_attn_in": True, "use_split_qkv_input": True},
    },
    "llama": {
        "result_mlp_in": {"use_attn_result": True, "use_hook_mlp_in": True},
        "split_qkv": {"use_split_qkv_input": True},
    },
    "neox": {"mlp_in_split_qkv": {"use_hook_mlp_in": True, "use_split_qkv_input": True}},
    "attn_only": {"result_attn_in": {"use_attn_result": True, "use_attn_in": True}},
    "mqa_ntk": {"result_split_qkv": {"use_attn_result": True, "use_split_qkv_input": True}},
    "norm_none": {"split_qkv": {"use_split_qkv_input": True}},
}

GRADIENTS = ("gpt2", "llama")
PADDED = {"gpt2": ("left", "right"), "llama": ("left",), "neox": ("left",)}
PROCESSED_PARAMS = ("gpt2", "llama", "solu_ln", "mixtral")
INEXACT_PROCESSING = ("ln_gated_final_rms",)

# Hooked runs: (op, hook, axis, index, number). "set" puts a stored random value there.
HOOKED: dict[str, dict[str, list[tuple[Any, ...]]]] = {
    "gpt2": {
        "zero_head": [("zero", "blocks.0.attn.hook_z", 2, 1, None)],
        "scale_resid": [("scale", "blocks.0.hook_resid_post", None, None, 0.5)],
        "patch_position": [("set", "blocks.1.hook_resid_pre", 1, 3, None)],
        "edit_pattern": [("zero", "blocks.1.attn.hook_pattern", 3, 0, None)],
        "two_hooks": [
            ("set", "hook_embed", 1, 2, None),
            ("scale", "blocks.1.ln2.hook_scale", None, None, 2.0),
            ("zero", "blocks.1.mlp.hook_post", 2, 5, None),
        ],
        "edit_result": [("zero", "blocks.0.attn.hook_result", 2, 3, None)],
        "edit_q_input": [("set", "blocks.1.hook_q_input", 2, 2, None)],
        "edit_final": [
            ("scale", "ln_final.hook_normalized", None, None, 3.0),
            ("set", "unembed.hook_out", 1, 6, None),
        ],
    },
    "llama": {
        "zero_kv_head": [("zero", "blocks.0.attn.hook_v", 2, 1, None)],
        "set_key": [("set", "blocks.1.attn.hook_k", 1, 2, None)],
        "set_rotated_query": [("set", "blocks.1.attn.hook_rot_q", 2, 3, None)],
        "gated_mlp": [
            ("scale", "blocks.0.mlp.hook_pre_linear", None, None, -1.0),
            ("set", "blocks.0.mlp.hook_pre", 1, 4, None),
        ],
    },
    "neox": {
        "outputs": [
            ("scale", "blocks.0.hook_attn_out", None, None, 2.0),
            ("zero", "blocks.0.hook_mlp_out", 1, 0, None),
        ],
    },
}
KEPT_OF_HOOKED = (
    "blocks.0.hook_resid_post", "blocks.1.attn.hook_pattern", "blocks.1.hook_resid_post", "unembed.hook_out",
)  # fmt: skip
FLAGS_FOR_HOOK = {"hook_result": "use_attn_result", "hook_q_input": "use_split_qkv_input"}


class Golden:
    """Tensors of one case under ``run/name``, each distinct one stored once."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.aliases: dict[str, str] = {}

    def put(self, key: str, value: torch.Tensor) -> None:
        """Stores ``value`` under ``key``, or an alias if the same tensor is there already."""
        value = value.detach().cpu().contiguous().clone()
        same = next((known for known, other in self.tensors.items() if _same(value, other)), None)
        if same is None:
            self.tensors[key] = value
        else:
            self.aliases[key] = same

    def put_all(self, run: str, values: State) -> list[str]:
        """Stores a mapping under ``run/…`` and returns its names in order."""
        for name, value in values.items():
            self.put(f"{run}/{name}", value)
        return list(values)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not a.numel():  # nothing of an expert that no token chose
        return False
    largest = float(a[a.isfinite()].abs().max())
    return torch.allclose(a, b, rtol=0, atol=2e-6 * min(1.0, largest))


def config_of(case: str) -> dict[str, Any]:
    """Returns the whole config of a case in tljax's field names."""
    return {**SIZES, **CONFIGS[case]}


def build(config: dict[str, Any], params: State | None, **switches: bool) -> HookedTransformer:
    """Builds a TransformerLens model from tljax's fields and, unless ``None``, loads ``params``."""
    model = HookedTransformer(HookedTransformerConfig(**config, **switches, device="cpu", seed=0))
    if params is not None:
        wrong = model.load_state_dict(dict(params), strict=False)
        missing = [name for name in wrong.missing_keys if not name.endswith(NO_PARAMETER)]
        if missing or wrong.unexpected_keys:
            raise ValueError(f"missing {missing}, unexpected {wrong.unexpected_keys}")
    return model.eval()


def parameters(model: HookedTransformer) -> dict[str, torch.Tensor]:
    """Returns the state dict without buffers."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith(NO_PARAMETER)}


def random_parameters(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Draws every parameter: matrices by their fan-in, biases of 0.3, norm weights around one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, like in parameters(build(config, None)).items():
        noise = torch.randn(like.shape, generator=generator)
        leaf = name.rsplit(".", 1)[-1].lstrip("_")
        if leaf == "w":
            drawn[name] = 1 + 0.3 * noise
        elif leaf.startswith("b"):
            drawn[name] = 0.3 * noise
        else:
            fan_in = 1 if leaf in ("W_E", "W_pos") else like.shape[-2]
            drawn[name] = 0.9 * noise / fan_in**0.5
    return drawn


def record_forward(
    golden: Golden, run: str, model: HookedTransformer, tokens: torch.Tensor, **inputs: Any
) -> list[str]:
    """Runs the model, stores logits, loss and the whole cache, returns the hook names in firing order."""
    with torch.no_grad():
        (logits, loss), cache = model.run_with_cache(tokens, return_type="both", **inputs)
    golden.put(f"{run}:logits", logits)
    golden.put(f"{run}:loss", loss)
    return golden.put_all(run, cache.cache_dict)


def record_gradients(golden: Golden, model: HookedTransformer, tokens: torch.Tensor) -> dict[str, Any]:
    """Stores the gradient of the mean loss at every hook point, named and ordered as ``incl_bwd`` does.

    TransformerLens calls ln1 once each for queries, keys and values, so the gradient at its points arrives in
    three parts, of which ``incl_bwd`` keeps the last. Stored is their sum: the gradient at the value.
    """
    _, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    order = [name for name in cache.cache_dict if name.endswith("_grad")]
    parts: dict[str, list[torch.Tensor]] = {}

    def keep(gradient: torch.Tensor, hook: Any) -> None:
        parts.setdefault(f"{hook.name}_grad", []).append(gradient.detach().clone())

    with model.hooks(bwd_hooks=[(lambda name: True, keep)]):
        model(tokens, return_type="loss").backward()
    for name in order:
        assert torch.equal(parts[name][-1], cache.cache_dict[name]), name
        golden.put(f"gradients/{name}", torch.stack(parts[name]).sum(0))
    in_parts = {name: len(parts[name]) for name in order if len(parts[name]) > 1}
    return {"kind": "gradients", "order": order, "in_parts": in_parts}


def edit(op: str, axis: int | None, index: int | None, factor: float | None, value: Any) -> Any:
    """Returns a TransformerLens hook that scales, zeroes or sets ``index`` along ``axis`` (or everything)."""

    def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = activation.clone()
        where = ... if axis is None else (slice(None),) * axis + (index,)
        changed[where] = value if op == "set" else changed[where] * (0.0 if op == "zero" else factor)
        return changed

    return hook


def record_hooked(golden: Golden, case: str, name: str, params: State, tokens: torch.Tensor) -> dict[str, Any]:
    """Runs the model under a case's edits; stores logits, what each edit left, and a few hooks downstream."""
    edits = HOOKED[case][name]
    switches = {flag: True for leaf, flag in FLAGS_FOR_HOOK.items() for e in edits if e[1].endswith(leaf)}
    model = build(config_of(case), params, **switches)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        _, shapes = model.run_with_cache(tokens)
    hooks, described = [], []
    for number, (op, hook_name, axis, index, factor) in enumerate(edits):
        value = None
        if op == "set":
            shape = shapes[hook_name].select(axis, index).shape
            value = torch.randn(shape, generator=generator)
            golden.put(f"{name}:value{number}", value)
        hooks.append((hook_name, edit(op, axis, index, factor, value)))
        described.append({"op": op, "hook": hook_name, "axis": axis, "index": index, "factor": factor})
    kept = [n for n in shapes if n in KEPT_OF_HOOKED or n in [e[1] for e in edits]]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens, names_filter=kept)
    golden.put(f"{name}:logits", logits)
    order = golden.put_all(name, cache.cache_dict)
    return {"kind": "hooked", "edits": described, "order": order}


def record_padded(golden: Golden, side: str, model: HookedTransformer, tokens: torch.Tensor) -> dict[str, Any]:
    """Runs a batch whose second row has two padding tokens on ``side``, with an explicit attention mask."""
    run = f"padded_{side}"
    mask = torch.ones(tokens.shape, dtype=torch.long)
    padding = slice(0, 2) if side == "left" else slice(-2, None)
    mask[1, padding] = 0
    tokens = torch.where(mask.bool(), tokens, 0)
    golden.put(f"{run}:tokens", tokens)
    golden.put(f"{run}:attention_mask", mask)
    order = record_forward(golden, run, model, tokens, attention_mask=mask, padding_side=side)
    return {"kind": "padded", "side": side, "order": order}


def record_processed(golden: Golden, case: str, params: State, tokens: torch.Tensor) -> dict[str, Any]:
    """Stores cache and parameters after ``load_and_process_state_dict`` with all on that is exact."""
    config = config_of(case)
    flags = {
        "fold_ln": True,
        "center_writing_weights": True,
        "center_unembed": config.get("output_logits_soft_cap", -1.0) <= 0,
        "fold_value_biases": True,
    }
    model = build(config, None)
    model.load_and_process_state_dict(dict(params), **flags)
    stored = golden.put_all("processed:params", parameters(model)) if case in PROCESSED_PARAMS else []
    order = record_forward(golden, "processed", model, tokens)
    return {
        "kind": "processed", "flags": flags, "order": order, "params": stored,
        "normalization_type": model.cfg.normalization_type,
    }  # fmt: skip


def make(case: str, seed: int) -> tuple[Golden, dict[str, Any]]:
    """Runs every recording of a case; returns its tensors and its record."""
    golden, config = Golden(), config_of(case)
    tokens = torch.randint(0, VOCAB, (BATCH, POS), generator=torch.Generator().manual_seed(seed))
    params = random_parameters(config, seed)
    golden.put("tokens", tokens)
    names = golden.put_all("params", params)
    base = build(config, params)
    runs: dict[str, Any] = {}
    for run, switches in {"base": {}, **SWITCHES.get(case, {})}.items():
        order = record_forward(golden, run, build(config, params, **switches), tokens)
        runs[run] = {"kind": "forward", "switches": switches, "order": order}
    if case not in INEXACT_PROCESSING:
        runs["processed"] = record_processed(golden, case, params, tokens)
    if case in GRADIENTS:
        runs["gradients"] = record_gradients(golden, base, tokens)
    for side in PADDED.get(case, ()):
        runs[f"padded_{side}"] = record_padded(golden, side, base, tokens)
    for name in HOOKED.get(case, {}):
        runs[name] = record_hooked(golden, case, name, params, tokens)
    packages = ("transformer-lens", "torch", "transformers", "safetensors", "numpy")
    versions = {package: importlib.metadata.version(package) for package in packages}
    record = {
        "case": case, "seed": seed, "config": config, "params": names, "runs": runs,
        "aliases": golden.aliases,
        "versions": {**versions, "python": platform.python_version()},
    }  # fmt: skip
    return golden, record


def main() -> None:
    """Writes one safetensors file for each case asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(CONFIGS)}; none means all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for seed, case in enumerate(CONFIGS):
        if arguments.cases and case not in arguments.cases:
            continue
        golden, record = make(case, seed)
        path = arguments.out / f"transformerlens_{case}.safetensors"
        save_file(golden.tensors, path, metadata={"record": json.dumps(record, separators=(",", ":"))})
        size = path.stat().st_size / 1e3
        print(f"{path.name}: {len(record['runs'])} runs, {len(golden.tensors)} tensors, {size:.0f} kB")


if __name__ == "__main__":
    main()
