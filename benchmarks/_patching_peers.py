"""What ``patching.py`` compares the sweep with. Imports torch and numpy alone, so that any environment can run it.

As a script it is the worker for an environment with TransformerLens 4: ``python _patching_peers.py REQUEST``, where
REQUEST is a file that :func:`ask_transformerlens4` wrote. It answers with one line of JSON.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

CHUNKS = (15, 45, 90, 180)


def synchronize(device: str) -> None:
    """Waits for the device, if it works behind Python's back."""
    if device != "cpu":
        torch.cuda.synchronize()


class HandBatched:
    """A residual-stream sweep in plain torch, written for speed: sites are the rows of a few large batches.

    Row i is the corrupted prompt with the clean residual stream written at its own layer and position. Queries, keys
    and values come from one matrix product, attention is the fused kernel, and only the last position is unembedded.

    Args:
        state: the weights, by TransformerLens's names.
        n_layers, n_heads: shape of the model.
        device: torch device.
    """

    def __init__(self, state: dict[str, torch.Tensor], n_layers: int, n_heads: int, device: str) -> None:
        state = {name: value.detach().to(device) for name, value in state.items()}
        self.n_layers, self.n_heads, self.device, self.state = n_layers, n_heads, device, state
        self.qkv, self.out = [], []
        for layer in range(n_layers):
            at = f"blocks.{layer}.attn."
            weight = torch.cat([state[f"{at}W_{n}"].transpose(0, 1).flatten(1) for n in "QKV"], dim=1).contiguous()
            self.qkv.append((weight, torch.cat([state[f"{at}b_{n}"].flatten() for n in "QKV"])))
            self.out.append((state[at + "W_O"].flatten(0, 1).contiguous(), state[at + "b_O"]))

    def _block(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        rows, pos, width = x.shape
        state, at = self.state, f"blocks.{layer}."
        weight, bias = self.qkv[layer]
        normal = F.layer_norm(x, (width,), state[at + "ln1.w"], state[at + "ln1.b"])
        qkv = torch.addmm(bias, normal.view(-1, width), weight).view(rows, pos, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows * pos, -1)
        weight, bias = self.out[layer]
        x = x + torch.addmm(bias, z, weight).view_as(x)
        normal = F.layer_norm(x, (width,), state[at + "ln2.w"], state[at + "ln2.b"]).view(-1, width)
        hidden = F.gelu(torch.addmm(state[at + "mlp.b_in"], normal, state[at + "mlp.W_in"]), approximate="tanh")
        return x + torch.addmm(state[at + "mlp.b_out"], hidden, state[at + "mlp.W_out"]).view_as(x)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.state["embed.W_E"][tokens] + self.state["pos_embed.W_pos"][: tokens.shape[1]]

    def residuals(self, tokens: torch.Tensor) -> torch.Tensor:
        """The residual stream entering each layer, ``[layer, pos, d_model]``, of one prompt ``[1, pos]``."""
        x, kept = self._embed(tokens), []
        for layer in range(self.n_layers):
            kept.append(x[0])
            x = self._block(layer, x)
        return torch.stack(kept)

    def sweep(
        self, tokens: torch.Tensor, clean: torch.Tensor, answer: int, wrong: int, chunk: int | None = None
    ) -> torch.Tensor:
        """Logit differences at the last position, ``[layer, pos]``.

        Args:
            tokens: the corrupted prompt ``[1, pos]``.
            clean: what is written, ``[layer, pos, d_model]``.
            answer, wrong: token ids.
            chunk: sites in a batch; ``None`` means all sites at once and the logits of every position, as it is done
                without thinking about it.
        """
        pos = tokens.shape[1]
        sites = torch.arange(self.n_layers * pos, device=tokens.device)
        kept = slice(None) if chunk is None else slice(-1, None)
        parts = sites.split(chunk or len(sites))
        last = torch.cat([self._run(tokens, clean, part, kept)[:, -1] for part in parts])
        return (last[:, answer] - last[:, wrong]).view(-1, pos)

    def _run(self, tokens: torch.Tensor, clean: torch.Tensor, sites: torch.Tensor, kept: slice) -> torch.Tensor:
        """Logits ``[site, kept pos, d_vocab]``."""
        layers, positions = sites // tokens.shape[1], sites % tokens.shape[1]
        x = self._embed(tokens).repeat(len(sites), 1, 1)
        for layer in range(self.n_layers):
            rows = (layers == layer).nonzero()[:, 0]
            x[rows, positions[rows]] = clean[layer, positions[rows]]
            x = self._block(layer, x)
        x = x[:, kept]
        normal = F.layer_norm(x, x.shape[2:], self.state["ln_final.w"], self.state["ln_final.b"])
        return normal @ self.state["unembed.W_U"] + self.state["unembed.b_U"]

    def fastest_chunk(self, tokens: torch.Tensor, clean: torch.Tensor, chunks: Sequence[int] = CHUNKS) -> int:
        """The chunk size that runs fastest here (best of two each)."""
        seconds = {chunk: min(self._time(tokens, clean, chunk) for _ in range(2)) for chunk in chunks}
        return min(seconds, key=lambda chunk: seconds[chunk])

    def _time(self, tokens: torch.Tensor, clean: torch.Tensor, chunk: int) -> float:
        start = time.perf_counter()
        self.sweep(tokens, clean, 0, 1, chunk)
        synchronize(self.device)
        return time.perf_counter() - start


def transformerlens_sweep(
    patching: Any, model: Any, tokens: torch.Tensor, cache: Any, answer: int, wrong: int
) -> torch.Tensor:
    """TransformerLens's own function, its progress bar thrown away; of 3.9 or 4.3, whichever ``patching`` is."""
    with contextlib.redirect_stderr(io.StringIO()):
        return patching.get_act_patch_resid_pre(
            model, tokens, cache, lambda logits: logits[0, -1, answer] - logits[0, -1, wrong]
        )


def hugging_face_state(state: dict[str, torch.Tensor], n_layers: int) -> dict[str, torch.Tensor]:
    """The same weights by the names of a Hugging Face GPT-2 with an unembedding of its own."""
    named = {
        "transformer.wte.weight": state["embed.W_E"],
        "transformer.wpe.weight": state["pos_embed.W_pos"],
        "transformer.ln_f.weight": state["ln_final.w"],
        "transformer.ln_f.bias": state["ln_final.b"],
        "lm_head.weight": state["unembed.W_U"].T,
    }
    for layer in range(n_layers):
        ours, theirs = f"blocks.{layer}.", f"transformer.h.{layer}."
        qkv = [state[f"{ours}attn.W_{n}"].transpose(0, 1).flatten(1) for n in "QKV"]
        named[theirs + "attn.c_attn.weight"] = torch.cat(qkv, dim=1)
        named[theirs + "attn.c_attn.bias"] = torch.cat([state[f"{ours}attn.b_{n}"].flatten() for n in "QKV"])
        named[theirs + "attn.c_proj.weight"] = state[ours + "attn.W_O"].flatten(0, 1)
        named[theirs + "attn.c_proj.bias"] = state[ours + "attn.b_O"]
        for number in "12":
            named[f"{theirs}ln_{number}.weight"] = state[f"{ours}ln{number}.w"]
            named[f"{theirs}ln_{number}.bias"] = state[f"{ours}ln{number}.b"]
        for place, layer_name in (("in", "c_fc"), ("out", "c_proj")):
            named[f"{theirs}mlp.{layer_name}.weight"] = state[f"{ours}mlp.W_{place}"]
            named[f"{theirs}mlp.{layer_name}.bias"] = state[f"{ours}mlp.b_{place}"]
    return {name: value.detach().cpu().contiguous() for name, value in named.items()}


def ask_transformerlens4(python: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Runs :func:`answer` in another environment.

    Args:
        python: that environment's interpreter.
        request: ``shape`` (TransformerLens's config fields), ``state`` (its weights), ``clean`` and each of
            ``corrupted`` (token ids ``[1, pos]``), ``answer`` and ``wrong`` (token ids), ``threads``, ``device``.

    Returns:
        ``version``, and ``seconds`` and ``values`` of each corrupted prompt's sweep.
    """
    return ask(python, Path(__file__), request, "TransformerLens 4's sweep")


def ask(python: Path, script: Path, request: dict[str, Any], what: str) -> dict[str, Any]:
    """Runs a script of this folder in another environment, with the request in a file, and returns what it answers."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "request.pt"
        state = hugging_face_state(request["state"], request["shape"]["n_layers"])
        torch.save({**request, "state": state}, path)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(python), str(script), str(path)], capture_output=True, text=True, env=environment, check=False
        )
    if done.returncode:
        raise SystemExit(f"{python} could not run {what}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def boot_bridge(shape: dict[str, Any], state: dict[str, Any], device: str) -> Any:
    """Boots TransformerLens 4's bridge on weights by Hugging Face's names, without a network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=shape["n_layers"],
        n_embd=shape["d_model"],
        n_head=shape["n_heads"],
        n_inner=shape["d_mlp"],
        n_positions=shape["n_ctx"],
        vocab_size=shape["d_vocab"],
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config).eval()
    model.load_state_dict(state, strict=False)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(Path(directory) / "gpt2")
        bridge = TransformerBridge.boot_transformers(str(Path(directory) / "gpt2"), device=device)
    return bridge.eval()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Boots TransformerLens 4's bridge on the request's weights and times its sweeps."""
    import transformer_lens.patching as patching

    device = request["device"]
    bridge = boot_bridge(request["shape"], request["state"], device)
    _, cache = bridge.run_with_cache(torch.as_tensor(request["clean"]).long().to(device))
    seconds, values = [], []
    for corrupted in request["corrupted"]:
        tokens = torch.as_tensor(corrupted).long().to(device)
        bridge(tokens)
        start = time.perf_counter()
        result = transformerlens_sweep(patching, bridge, tokens, cache, request["answer"], request["wrong"])
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        values.append(result.cpu().numpy().tolist())
    return {"version": metadata.version("transformer-lens"), "seconds": seconds, "values": values}


def matmul_rate(device: str, tokens: int = 128, repeats: int = 25) -> float:
    """GFLOP/s of torch multiplying ``[tokens, 768]`` by ``[768, 3072]``."""
    x, weight = torch.ones(tokens, 768, device=device), torch.ones(768, 3072, device=device)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(x, weight)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * 768 * 3072 / float(np.median(seconds)) / 1e9


if __name__ == "__main__":
    asked = torch.load(sys.argv[1], weights_only=False)
    torch.set_num_threads(asked["threads"])
    torch.set_grad_enabled(False)
    with contextlib.redirect_stdout(sys.stderr):
        answered = answer(asked)
    print(json.dumps(answered))
