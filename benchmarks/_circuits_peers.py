"""What ``circuits.py`` compares with: edge attribution as it is done on TransformerLens 3.9, by hooks at every input.

Imports torch and NumPy alone, so that any environment can run it. The procedure is that of the published EAP-IG code:
what every writer writes is kept for both runs, queries, keys and values have inputs of their own, and a backward hook
at each input contracts its gradient with the differences. As a script it is the worker for an environment with
TransformerLens 4: ``python _circuits_peers.py REQUEST``, where :func:`ask_transformerlens4` wrote REQUEST.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from _patching_peers import ask, boot_bridge

Tensor = torch.Tensor


class EdgesByHooks:
    """Edge attribution, and the evaluation of one circuit, on a TransformerLens 3.9 model.

    Args:
        model: its ``HookedTransformer``.
        clean, corrupted: token ids ``[batch, pos]``.
        answer, wrong: token ids of the logit difference at the last position.
    """

    def __init__(self, model: Any, clean: Tensor, corrupted: Tensor, answer: int, wrong: int) -> None:
        self.model, self.clean, self.corrupted = model, clean, corrupted
        self.answer, self.wrong = answer, wrong
        self.layers, self.heads = model.cfg.n_layers, model.cfg.n_heads
        self.writers = 1 + self.layers * (self.heads + 1)
        self.readers = self.layers * (3 * self.heads + 1) + 1
        for switch in ("set_use_attn_result", "set_use_split_qkv_input", "set_use_hook_mlp_in"):
            getattr(model, switch)(True)

    def metric(self, logits: Tensor) -> Tensor:
        """The mean logit difference."""
        return (logits[:, -1, self.answer] - logits[:, -1, self.wrong]).mean()

    def first_writer(self, layer: int) -> int:
        """The number of a layer's first writer."""
        return 1 + layer * (self.heads + 1)

    def first_reader(self, layer: int) -> int:
        """The number of a layer's first reader."""
        return layer * (3 * self.heads + 1)

    def keep_outputs(self, kept: Tensor, sign: float) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks that add what every writer writes, times ``sign``, to ``kept`` ``[batch, pos, writer, d_model]``."""

        def keep(columns: slice) -> Callable[..., None]:
            def hook(value: Tensor, hook: Any) -> None:
                kept[:, :, columns] += sign * (value if value.ndim == 4 else value[:, :, None]).detach()

            return hook

        hooks = [("hook_embed", keep(slice(0, 1)))]
        for layer in range(self.layers):
            first = self.first_writer(layer)
            hooks.append((f"blocks.{layer}.attn.hook_result", keep(slice(first, first + self.heads))))
            hooks.append((f"blocks.{layer}.hook_mlp_out", keep(slice(first + self.heads, first + self.heads + 1))))
        return hooks

    def at_inputs(self, make: Callable[[int, slice], Callable[..., Any]]) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks at every reader's input, by ``make``: how many writers come before the readers, and which those are."""
        hooks = []
        for layer in range(self.layers):
            before, first = self.first_writer(layer), self.first_reader(layer)
            for number, letter in enumerate("qkv"):
                columns = slice(first + number * self.heads, first + (number + 1) * self.heads)
                hooks.append((f"blocks.{layer}.hook_{letter}_input", make(before, columns)))
            mlp = first + 3 * self.heads
            hooks.append((f"blocks.{layer}.hook_mlp_in", make(before + self.heads, slice(mlp, mlp + 1))))
        last = slice(self.readers - 1, self.readers)
        return [*hooks, (f"blocks.{self.layers - 1}.hook_resid_post", make(self.writers, last))]

    def keep_scores(self, difference: Tensor, scores: Tensor) -> list[tuple[str, Callable[..., Any]]]:
        """Backward hooks that add to ``scores`` the product of each input's gradient with the differences."""

        def contract(writers: int, columns: slice) -> Callable[..., None]:
            def hook(gradient: Tensor, hook: Any) -> None:
                gradient = gradient if gradient.ndim == 4 else gradient[:, :, None]
                product = torch.einsum("bpfd,bprd->fr", difference[:, :, :writers], gradient)
                scores[:writers, columns] += product

            return hook

        return self.at_inputs(contract)

    def difference(self) -> tuple[Tensor, Tensor, Tensor]:
        """What writers write in the corrupted run less the clean one, and the embeddings of both."""
        shape = (*self.clean.shape, self.writers, self.model.cfg.d_model)
        difference = torch.zeros(shape)
        with torch.no_grad():
            self.model.run_with_hooks(self.corrupted, fwd_hooks=self.keep_outputs(difference, 1.0))
            corrupted = difference[:, :, 0].clone()
            self.model.run_with_hooks(self.clean, fwd_hooks=self.keep_outputs(difference, -1.0))
        return difference, corrupted - difference[:, :, 0], corrupted

    def attribute(self, steps: int = 0) -> Tensor:
        """EAP, or with ``steps`` EAP-IG over the embeddings: ``[writer, reader]``, patched minus clean."""
        difference, clean, corrupted = self.difference()
        scores = torch.zeros(self.writers, self.readers)
        for step in range(max(steps, 1)):
            hooks = []
            if steps:
                mixed = corrupted + step / steps * (clean - corrupted)

                def replace(value: Tensor, hook: Any, mixed: Tensor = mixed) -> Tensor:
                    return mixed.requires_grad_(True)

                hooks.append(("hook_embed", replace))
            with torch.enable_grad(), self.model.hooks(hooks, self.keep_scores(difference, scores)):
                self.metric(self.model(self.clean)).backward()
            self.model.zero_grad()
        return scores / max(steps, 1)

    def evaluate(self, mask: Tensor) -> float:
        """The mean logit difference of a circuit ``[writer, reader]``: edges outside it carry the corrupted value."""
        shape = (*self.clean.shape, self.writers, self.model.cfg.d_model)
        lacking = torch.zeros(shape)
        absent = 1 - mask.float()

        def add(writers: int, columns: slice) -> Callable[..., Tensor]:
            def hook(value: Tensor, hook: Any) -> Tensor:
                change = torch.einsum("bpfd,fr->bprd", lacking[:, :, :writers], absent[:writers, columns])
                return value + (change if value.ndim == 4 else change[:, :, 0])

            return hook

        with torch.no_grad():
            self.model.run_with_hooks(self.corrupted, fwd_hooks=self.keep_outputs(lacking, 1.0))
            logits = self.model.run_with_hooks(
                self.clean, fwd_hooks=[*self.keep_outputs(lacking, -1.0), *self.at_inputs(add)]
            )
        return float(self.metric(logits))


def ask_transformerlens4(python: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Runs :func:`answer` in another environment.

    Args:
        python: that environment's interpreter.
        request: ``shape`` (TransformerLens's config fields), ``state`` (its weights), ``clean`` and ``corrupted``
            (token ids ``[batch, pos]``), ``answer`` and ``wrong`` (token ids), ``threads``.

    Returns:
        ``version``; ``seconds`` of node attribution of all pairs and of per-position edges of the first; the sum of
        each one's absolute scores.
    """
    return ask(python, Path(__file__), request, "TransformerLens 4's attribution")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Times TransformerLens 4's attribution on the request's weights."""
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    bridge = boot_bridge(request["shape"], request["state"], "cpu")
    clean, corrupted = (torch.as_tensor(request[name]).long() for name in ("clean", "corrupted"))

    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1, request["answer"]] - logits[:, -1, request["wrong"]]).mean()

    seconds, sums = {}, {}
    for granularity, pairs in (("node", len(clean)), ("edge", 1)):
        config = EdgeAttributionConfig(granularity=granularity)
        attribution_patch(bridge, clean[:1, :4], corrupted[:1, :4], metric, config)
        start = time.perf_counter()
        result = attribution_patch(bridge, clean[:pairs], corrupted[:pairs], metric, config)
        seconds[granularity] = time.perf_counter() - start
        scores = result.node_scores if granularity == "node" else result.edge_scores
        sums[granularity] = sum(abs(float(score)) for score in scores.values())
    return {"version": metadata.version("transformer-lens"), "seconds": seconds, "sums": sums}


if __name__ == "__main__":
    asked = torch.load(sys.argv[1], weights_only=False)
    torch.set_num_threads(asked["threads"])
    with contextlib.redirect_stdout(sys.stderr):
        answered = answer(asked)
    print(json.dumps(answered))
