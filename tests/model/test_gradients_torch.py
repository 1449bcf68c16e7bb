"""Gradients at hook points equal PyTorch autograd's at every point that transformers' modules show."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from hf_models import make_of

from tljax import HookedTransformer
from tljax.patching import LogitDiff, Loss

SIZES = {
    "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40,
    "num_key_value_heads": 2, "max_position_embeddings": 24, "head_dim": 10, "attn_implementation": "eager",
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 11))
ANSWER, WRONG = np.asarray([3, 5]), np.asarray([7, 2])
TOLERANCE = 1e-4


def gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=24, vocab_size=40, attn_implementation="eager")


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES, attention_bias=True)


def gemma2() -> Any:
    from transformers import Gemma2Config

    return Gemma2Config(**SIZES, sliding_window=5, query_pre_attn_scalar=12, final_logit_softcapping=3.0)


class Tensors:
    """Tensors of a run of transformers' model, by hook name; their gradients are read after the backward pass."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def output(self, module: Any, *names: str) -> None:
        """Keeps a module's output under a name; under several, in equal parts of its last axis."""

        def keep(_: Any, __: Any, out: Any) -> None:
            tensor = out[0] if isinstance(out, tuple) else out
            tensor.retain_grad()
            self.found |= {name: (tensor, number, len(names)) for number, name in enumerate(names)}

        module.register_forward_hook(keep)

    def input(self, module: Any, *names: str) -> None:
        """Keeps a module's input."""

        def keep(_: Any, args: Any, kwargs: Any) -> None:
            tensor = args[0] if args else kwargs["hidden_states"]
            tensor.retain_grad()
            self.found |= dict.fromkeys(names, (tensor, 0, 1))

        module.register_forward_pre_hook(keep, with_kwargs=True)

    def gradients(self) -> dict[str, np.ndarray]:
        parts = {name: np.split(tensor.grad.numpy(), of, axis=-1)[n] for name, (tensor, n, of) in self.found.items()}
        return {name: np.array(part) for name, part in parts.items()}


def watch_gpt2(hf: Any, seen: Tensors) -> None:
    for number, block in enumerate(hf.transformer.h):
        at = f"blocks.{number}."
        seen.input(block, at + "hook_resid_pre")
        seen.output(block.attn.c_attn, *(f"{at}attn.hook_{letter}" for letter in "qkv"))
        seen.input(block.attn.c_proj, at + "attn.hook_z")
        seen.output(block.attn.c_proj, at + "hook_attn_out")
        seen.input(block.ln_2, at + "hook_resid_mid")
        seen.output(block.mlp.c_fc, at + "mlp.hook_pre")
        seen.input(block.mlp.c_proj, at + "mlp.hook_post")
        seen.output(block.mlp.c_proj, at + "hook_mlp_out")
    seen.output(hf.transformer.wte, "hook_embed")
    seen.input(hf.transformer.ln_f, "blocks.1.hook_resid_post")


def watch_llama(hf: Any, seen: Tensors) -> None:
    for number, block in enumerate(hf.model.layers):
        at, post_norms = f"blocks.{number}.", hasattr(block, "pre_feedforward_layernorm")
        seen.input(block, at + "hook_resid_pre")
        for letter in "qkv":
            seen.output(getattr(block.self_attn, f"{letter}_proj"), f"{at}attn.hook_{letter}")
        seen.input(block.self_attn.o_proj, at + "attn.hook_z")
        seen.output(block.post_attention_layernorm if post_norms else block.self_attn.o_proj, at + "hook_attn_out")
        seen.input(
            block.pre_feedforward_layernorm if post_norms else block.post_attention_layernorm, at + "hook_resid_mid"
        )
        seen.output(block.mlp.gate_proj, at + "mlp.hook_pre")
        seen.output(block.mlp.up_proj, at + "mlp.hook_pre_linear")
        seen.input(block.mlp.down_proj, at + "mlp.hook_post")
        seen.output(block.post_feedforward_layernorm if post_norms else block.mlp.down_proj, at + "hook_mlp_out")
    seen.input(hf.model.norm, "blocks.1.hook_resid_post")
    seen.input(hf.lm_head, "unembed.hook_in")
    seen.output(hf.lm_head, "unembed.hook_out")


CASES = {"gpt2": (gpt2, watch_gpt2), "llama_gqa": (llama, watch_llama), "gemma2": (gemma2, watch_llama)}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_autograd(case: str, tmp_path: Path) -> None:
    """Residual streams, queries, keys, values, patterns, what attention and MLP add, neurons: in both metrics."""
    import torch

    config, watch = CASES[case]
    hf, seen = make_of(config(), tmp_path), Tensors()
    watch(hf, seen)
    model = HookedTransformer.from_pretrained_no_processing(tmp_path)
    ours = model.run_with_grads(TOKENS, {"difference": LogitDiff(ANSWER, WRONG), "loss": Loss(TOKENS)})
    for metric in ("difference", "loss"):
        run = hf(torch.tensor(TOKENS), output_attentions=True)
        for layer, pattern in enumerate(run.attentions):
            pattern.retain_grad()
            seen.found[f"blocks.{layer}.attn.hook_pattern"] = pattern, 0, 1
        rows = torch.arange(2)
        if metric == "difference":
            last = run.logits[:, -1]
            value = last[rows, torch.tensor(ANSWER)] - last[rows, torch.tensor(WRONG)]
        else:
            chosen = run.logits[:, :-1].log_softmax(-1).gather(-1, torch.tensor(TOKENS)[:, 1:, None])
            value = -chosen[..., 0].mean(-1)
        np.testing.assert_allclose(ours.value[metric], value.detach(), atol=TOLERANCE)
        value.sum().backward()
        expected = seen.gradients()
        assert len(expected) >= 20
        for name, gradient in expected.items():
            got = np.asarray(ours.grads[metric][name])
            np.testing.assert_allclose(got, gradient.reshape(got.shape), rtol=1e-4, atol=TOLERANCE, err_msg=name)
            assert np.abs(got).max() > 1e-3, name
