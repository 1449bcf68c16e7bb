"""Training steps at gpt2-small's width, 12,288 features, 4,096 tokens, against SAELens; and a stack of four.

An L1 dictionary is measured as it starts, with half its features active, and with the few that most of a run has.
"""

import argparse
import resource
from collections.abc import Callable
from importlib import util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _timing import interleaved, print_table

from tljax.dictionaries.training import Preparation, TrainingConfig, initial_parameters
from tljax.dictionaries.training.coefficients import numbers_of, structure_of
from tljax.dictionaries.training.step import initial_state, members_at_once, train_step, train_step_of_stack

TOKENS, D, F, K = 4096, 768, 12288, 64
PRODUCT = 2 * TOKENS * D * F
"""Operations of one matrix product of a step."""
OURS, PEERS = 5, 6
"""Products of a step: SAELens's has one more, for the gradient of ``b_dec`` through the encoder."""
FEW = 100
"""Features active in a token after some training: of the step's products, only the encoder's then needs all of them."""
BARS = {"standard": 1.9, "standard, few active": 1.9, "batchtopk": 2.0}
OF_ONE = 3.6

CONFIGS = {
    "standard": TrainingConfig(d_in=D, d_sae=F, l1_coefficient=5.0),
    "standard, few active": TrainingConfig(d_in=D, d_sae=F, l1_coefficient=5.0, lr=1e-7),  # so that it stays so
    "batchtopk": TrainingConfig(architecture="batchtopk", k=K, d_in=D, d_sae=F),
}


def training(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds a step, in turns with SAELens (or its step in torch, where it is not installed) and the bare products."""
    torch.set_num_threads(arguments.threads)
    rows = np.random.default_rng(0).standard_normal((TOKENS, D)).astype(np.float32)
    table = []
    for name, cfg in CONFIGS.items():
        start = _start(name, rows)
        active = K if name == "batchtopk" else _active(start, rows)
        ours = OURS if active > F // 32 else 1 + (OURS - 1) * active / F
        print(f"{name}: {active:.0f} features active in a token")
        tasks = {
            "five products": _products(rows),
            "tljax": _step(cfg, rows, start),
            _peer_name(): _peer(name, rows, start),
        }
        timings = interleaved(tasks, arguments.repeats, warmup=2)
        floor = timings["five products"].median
        for task, timing in timings.items():
            is_peer = task == _peer_name()
            ratio = timing.median / timings["tljax"].median
            row = {"step": name, "by": task, "s": round(timing.median, 2), "fastest": round(timing.fastest, 2)}
            row |= {
                "GFLOP": round({"tljax": ours, _peer_name(): PEERS}.get(task, OURS) * PRODUCT / 1e9),
                "of products": round(timing.median / floor, 2),
            }
            row |= {"of tljax": round(ratio, 2), "bar": BARS[name] if is_peer else ""}
            table.append(row | {"met": ("yes" if ratio >= BARS[name] else "NO") if is_peer else ""})
        del tasks
    print_table(table)
    stacks = _stacks(rows, arguments)
    print_table(stacks)
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return table + stacks


def _stacks(rows: np.ndarray, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Times a stack of four against one, at the large size and at a small one."""
    table = []
    for name, cfg, x in (
        ("batchtopk", CONFIGS["batchtopk"], rows),
        (
            "batchtopk, d 64, 512 features, 256 tokens",
            CONFIGS["batchtopk"].replace(d_in=64, d_sae=512, k=10),
            rows[:256, :64],
        ),
    ):
        tasks = {"one": _step(cfg, x, initial_parameters(cfg)), "a stack of 4": _step_of_stack(cfg, x, 4)}
        timings = interleaved(tasks, arguments.repeats, warmup=2)
        ratio = timings["a stack of 4"].median / timings["one"].median
        for task, timing in timings.items():
            is_stack = task != "one"
            row = {
                "step": name,
                "by": task,
                "s": round(timing.median, 4),
                "of one": round(ratio, 2) if is_stack else "",
            }
            row |= {"bar": OF_ONE if is_stack else "", "met": ("yes" if ratio <= OF_ONE else "NO") if is_stack else ""}
            table.append(row)
        del tasks
    return table


def _products(rows: np.ndarray) -> Callable[[int], Any]:
    """The products of a step alone, a chunk of 512 tokens at a time."""
    x, w = jnp.asarray(rows), jnp.ones((D, F))

    @jax.jit
    def five(x: jax.Array, w: jax.Array) -> Any:
        def chunk(total: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
            f = part @ w
            g = (f @ w.T) @ w
            return total + part.T @ f + part.T @ g, None

        return jax.lax.scan(chunk, jnp.zeros((D, F)), x.reshape(8, -1, D))[0]

    return lambda number: jax.block_until_ready(five(x, w))


def _start(name: str, rows: np.ndarray) -> dict[str, jax.Array]:
    """The parameters that both sides start from."""
    params = initial_parameters(CONFIGS[name])
    if name == "standard, few active":
        params["b_enc"] -= np.quantile(rows[:256] @ np.asarray(params["W_enc"]), 1 - FEW / F).astype(np.float32)
    return params


def _active(params: dict[str, jax.Array], rows: np.ndarray) -> float:
    """How many features are active in a token."""
    return float((rows[:256] @ np.asarray(params["W_enc"]) + np.asarray(params["b_enc"]) > 0).sum(axis=-1).mean())


def _step(cfg: TrainingConfig, rows: np.ndarray, start: dict[str, jax.Array]) -> Callable[[int], Any]:
    state = jax.tree.map(jnp.array, initial_state(start, cfg, None))
    numbers, structure, x = numbers_of(cfg, 1000), structure_of(cfg, cfg.k), jnp.asarray(rows)

    def run(number: int) -> None:
        nonlocal state
        state, metrics = train_step(state, x, None, numbers, Preparation(), structure, None)
        jax.block_until_ready(metrics)

    return run


def _step_of_stack(cfg: TrainingConfig, rows: np.ndarray, members: int) -> Callable[[int], Any]:
    cfgs = [cfg.replace(k=cfg.k and cfg.k // 2 + 8 * seed, seed=seed) for seed in range(members)]
    states = [initial_state(initial_parameters(one), one, None) for one in cfgs]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    numbers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(numbers_of(one, 1000) for one in cfgs))
    structure, x = structure_of(cfg, max(one.k or 1 for one in cfgs)), jnp.asarray(rows)
    at_once = members_at_once(members)

    def run(number: int) -> None:
        nonlocal state
        state, metrics = train_step_of_stack(state, x, None, numbers, Preparation(), structure, None, at_once)
        jax.block_until_ready(metrics)

    return run


def _peer_name() -> str:
    return "SAELens" if util.find_spec("sae_lens") else "SAELens's step in torch"


def _peer(name: str, rows: np.ndarray, start: dict[str, jax.Array]) -> Callable[[int], Any]:
    return _saelens(name, rows, start) if util.find_spec("sae_lens") else _torch_step(name, rows, start)


def _saelens(name: str, rows: np.ndarray, start: dict[str, jax.Array]) -> Callable[[int], Any]:
    from sae_lens import (  # pyright: ignore[reportMissingImports]
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
    )
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    if name != "batchtopk":
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F, l1_coefficient=5.0, device="cpu"))
    else:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, device="cpu"))
    sae.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in start.items()}, strict=False)
    lr = CONFIGS[name].lr
    cfg = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=TOKENS * 1000,
        device="cpu", autocast=False, lr=lr, lr_end=lr / 10, lr_scheduler_name="constant", lr_warm_up_steps=0,
        adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=TOKENS,
        dead_feature_window=1000, feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer, x = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(())), torch.from_numpy(rows)

    def run(number: int) -> None:
        with torch.enable_grad():
            trainer.step(x)

    return run


def _torch_step(name: str, rows: np.ndarray, start: dict[str, jax.Array]) -> Callable[[int], Any]:
    """The same step written plainly: forward, autograd, clipping and Adam."""
    params = {key: torch.from_numpy(np.array(value)).requires_grad_() for key, value in start.items()}
    adam, x = torch.optim.Adam(params.values(), lr=CONFIGS[name].lr), torch.from_numpy(rows)

    def run(number: int) -> None:
        with torch.enable_grad():
            norms = params["W_dec"].norm(dim=-1)
            f = torch.relu((x - params["b_dec"]) @ params["W_enc"] + params["b_enc"])
            penalty = torch.zeros(())
            if name == "batchtopk":
                flat = (f * norms).flatten()
                top = flat.topk(K * TOKENS, sorted=False)
                f = torch.zeros_like(flat).scatter(-1, top.indices, top.values).reshape(f.shape) / norms
            else:
                penalty = 5.0 * (f * norms).sum(dim=-1).mean()
            out = f @ params["W_dec"] + params["b_dec"]
            loss = (out - x).pow(2).sum(dim=-1).mean() + penalty
            adam.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        adam.step()

    return run
