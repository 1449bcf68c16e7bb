"""A mixture of experts against every expert on every token, and against transformers' Mixtral block, in one run.

    python benchmarks/experts.py [--tokens 1024] [--experts 8 32] [--json]

One MoE layer (d_model 512, experts of width 1024, two for each token) in float32. Every way computes the same outputs
from the same weights, which is checked first; the best of several rounds counts, the ways taking turns.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import HookedTransformerConfig
from tljax.modules.moe import MoE

WIDTH, INNER, CHOSEN = 512, 1024, 2


def ours(n_experts: int) -> tuple[MoE, Any]:
    """The module and random parameters."""
    cfg = HookedTransformerConfig(
        d_model=WIDTH, n_heads=8, n_layers=1, n_ctx=8, d_mlp=INNER, act_fn="silu", gated_mlp=True,
        normalization_type="RMS", num_experts=n_experts, experts_per_token=CHOSEN, norm_topk_prob=True,
    )  # fmt: skip
    module = MoE(cfg)
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1, WIDTH)))


def every_expert(variables: Any, x: jax.Array) -> jax.Array:
    """Every expert on every token, of which the chosen ones' outputs are kept."""
    params = variables["params"]
    weights = jax.nn.softmax(jnp.einsum("bpd,de->bpe", x, params["W_router"]))
    kept, chosen = jax.lax.top_k(weights, CHOSEN)
    kept = jnp.zeros_like(weights).at[(*jnp.indices(chosen.shape)[:2], chosen)].set(kept / kept.sum(-1, keepdims=True))
    experts = params["experts"]
    inner = jax.nn.silu(jnp.einsum("bpd,edn->bpen", x, experts["W_gate"]))
    inner = inner * jnp.einsum("bpd,edn->bpen", x, experts["W_in"])
    return jnp.einsum("bpen,end,bpe->bpd", inner, experts["W_out"], kept)


def of_transformers(variables: Any, n_experts: int) -> Callable[[np.ndarray], np.ndarray]:
    """transformers' block with the same weights."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=n_experts, num_experts_per_tok=CHOSEN
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).eval()
    params = jax.tree.map(np.asarray, variables["params"])
    experts = params["experts"]
    fused = np.concatenate([experts["W_gate"], experts["W_in"]], axis=2).swapaxes(1, 2)
    state = {
        "gate.weight": params["W_router"].T, "experts.gate_up_proj": fused,
        "experts.down_proj": experts["W_out"].swapaxes(1, 2),
    }  # fmt: skip
    block.load_state_dict({name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()})

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return block(torch.from_numpy(x)).numpy()

    return run


def measure(n_experts: int, n_tokens: int, rounds: int) -> dict[str, float]:
    """Milliseconds of each way."""
    module, variables = ours(n_experts)
    x = np.random.default_rng(0).standard_normal((1, n_tokens, WIDTH)).astype(np.float32)
    on_device = jnp.asarray(x)
    grouped, dense = jax.jit(module.apply), jax.jit(every_expert)
    backward = {
        name: jax.jit(jax.grad(lambda v, x: module.apply(v, x).sum(), argnums=argnums))
        for name, argnums in (("the input", 1), ("everything", (0, 1)))
    }
    theirs = of_transformers(variables, n_experts)
    ways: dict[str, Callable[[], Any]] = {
        "tljax": lambda: jax.block_until_ready(grouped(variables, on_device)),
        "every expert": lambda: jax.block_until_ready(dense(variables, on_device)),
        "transformers": lambda: theirs(x),
    }
    outputs = {name: np.asarray(way()) for name, way in ways.items()}
    ways |= {
        f"tljax, gradient of {name}": lambda f=f: jax.block_until_ready(f(variables, on_device))
        for name, f in backward.items()
    }
    for name, output in outputs.items():
        np.testing.assert_allclose(output, outputs["tljax"], atol=1e-4 * np.abs(outputs["tljax"]).max(), err_msg=name)
    for way in ways.values():
        way()
    best = dict.fromkeys(ways, np.inf)
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def main() -> None:
    """Prints times and ratios for each number of experts and of tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = [
        {"experts": experts, "tokens": tokens, **measure(experts, tokens, arguments.rounds)}
        for experts in arguments.experts
        for tokens in arguments.tokens
    ]
    if arguments.json:
        print(json.dumps(results))
        return
    for result in results:
        mine = result["tljax"]
        print(f"{result['experts']} experts, {result['tokens']} tokens: tljax {mine:.2f} ms")
        for name in list(result)[3:]:
            print(f"    {name}: {result[name]:.2f} ms, {result[name] / mine:.2f} x tljax")


if __name__ == "__main__":
    main()
