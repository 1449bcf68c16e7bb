"""The same work in torch with transformers, on the same device; random weights of the same shape."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

Task = Callable[[int], Any]


class Peer:
    """gpt2 of a shape, on CUDA or the CPU.

    Args:
        shape: fields of tljax's config.
        device: torch's name of the device.
        dtype: dtype of the weights.
    """

    def __init__(self, shape: dict[str, Any], device: str, dtype: str = "float32") -> None:
        if device == "cpu":
            torch.set_num_threads(1)  # beside jax's threads, more of torch's wait for each other
        cfg = GPT2Config(
            n_embd=shape["d_model"], n_layer=shape["n_layers"], n_head=shape["n_heads"], n_positions=shape["n_ctx"],
            n_inner=shape["d_mlp"], vocab_size=shape["d_vocab"], eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        self.model, self.device = GPT2LMHeadModel(cfg).to(device, getattr(torch, dtype)).eval(), device
        self.blocks = list(self.model.transformer.h)

    def tokens(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(tokens).long().to(self.device)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> Any:
        found = self.model(tokens, use_cache=False).logits
        self.wait()
        return found

    @torch.no_grad()
    def cached(self, tokens: torch.Tensor) -> Any:
        """Keeps the output of every module."""
        kept: dict[int, Any] = {}
        handles = [
            module.register_forward_hook(lambda m, i, out, n=n: kept.__setitem__(n, out))
            for n, module in enumerate(self.model.modules())
        ]
        try:
            return self.forward(tokens), kept
        finally:
            for handle in handles:
                handle.remove()

    def hooked(self, tokens: torch.Tensor, number: int) -> Any:
        """Changes one block's output by a new closure."""
        layer, pos = number * 5 % len(self.blocks), number * 7 % tokens.shape[1]

        def change(module: Any, given: Any, out: Any) -> Any:
            stream = (out[0] if isinstance(out, tuple) else out).clone()
            stream[:, pos] *= 0.5
            return (stream, *out[1:]) if isinstance(out, tuple) else stream

        handle = self.blocks[layer].register_forward_hook(change)
        try:
            return self.forward(tokens)
        finally:
            handle.remove()

    @torch.no_grad()
    def sweep(self, tokens: torch.Tensor, clean: torch.Tensor) -> Any:
        """Patches every layer and position of the residual stream; a layer's positions run as one batch."""
        states = self.model(clean, use_cache=False, output_hidden_states=True).hidden_states
        n_pos, values = tokens.shape[1], []
        batch, place = tokens.expand(n_pos, -1), torch.arange(n_pos, device=tokens.device)
        for layer, block in enumerate(self.blocks):

            def change(module: Any, given: Any, layer: int = layer) -> Any:
                stream = given[0].clone()
                stream[place, place] = states[layer][0, place]
                return (stream, *given[1:])

            handle = block.register_forward_pre_hook(change)
            logits = self.model(batch, use_cache=False, logits_to_keep=1).logits[:, -1]
            values.append(logits[:, 3] - logits[:, 4])
            handle.remove()
        found = torch.stack(values)
        self.wait()
        return found

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, n_new: int) -> Any:
        found = self.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n_new, do_sample=False, pad_token_id=0
        )
        self.wait()
        return found
