"""What the accelerator script times: each piece of work, with its peer in torch where it has one."""

import functools
import tempfile
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _timing import GPT2_SMALL

import tljax
from tljax.patching import LogitDiff, sweep

SMALL = {
    "d_model": 32, "n_layers": 2, "n_heads": 4, "d_head": 8, "d_mlp": 64, "n_ctx": 64, "d_vocab": 96,
    "act_fn": "gelu_new",
}  # fmt: skip
Task = Callable[[int], Any]


class Work:
    """What is timed: each piece with its peer in torch, or none.

    Models are made when a piece first needs them, so that what fails is one row.

    Args:
        small: narrow and short.
        directory: where harvests go.
        torch: whether torch stands beside it, where it sees the same device.
    """

    def __init__(self, small: bool, directory: Path, torch: bool = True) -> None:
        self.small, self.directory, self.torch, self.torch_error = small, directory, torch, ""
        self.shape = SMALL if small else GPT2_SMALL | {"n_ctx": 4096}

    @functools.cached_property
    def model(self) -> tljax.HookedTransformer:
        return tljax.HookedTransformer(tljax.HookedTransformerConfig(**self.shape, seed=0))

    @functools.cached_property
    def narrow(self) -> tljax.HookedTransformer:
        """The model in bfloat16, where an accelerator has kernels of attention."""
        return self.model.to("bfloat16")

    @functools.cached_property
    def peer(self) -> Any:
        return self._peer("float32")

    @functools.cached_property
    def narrow_peer(self) -> Any:
        return self._peer("bfloat16")

    def _peer(self, dtype: str) -> Any:
        """Torch's model, or ``None``; why it could not be made is kept in ``torch_error``."""
        try:
            return _peer(self.shape, dtype) if self.torch else None
        except Exception as error:  # a torch that does not fit the card costs no row of ours
            self.torch_error = f"{type(error).__name__}: {error}"[:300]
            return None

    def tokens(self, batch: int, pos: int, seed: int = 0) -> np.ndarray:
        drawn = np.random.default_rng(seed).integers(0, self.shape["d_vocab"], (batch, pos))
        return drawn.astype(np.int32)

    def pieces(self) -> Iterator[tuple[str, Callable[[], dict[str, Task]]]]:
        """Yields names, and functions that make the tasks, which may take memory."""
        sizes = ((1, 8), (2, 16), (1, 32)) if self.small else ((1, 16), (8, 256), (1, 4096))
        for batch, pos in sizes:
            yield f"forward {batch}x{pos}", functools.partial(self._forward, batch, pos)
        batch, pos = sizes[-1]
        for path in ("auto", "blockwise"):
            yield f"forward {batch}x{pos}, bfloat16, {path}", functools.partial(self._narrow, batch, pos, path)
        yield "full cache", self._cache
        yield "hooked loop", self._hooked
        yield "residual sweep", self._sweep
        for batch in (1, 4) if self.small else (1, 16):
            yield f"generation, batch {batch}", functools.partial(self._generate, batch)
        yield "EAP-IG", self._edges
        yield "a dictionary's step", self._dictionary
        yield "harvest", self._harvest

    def _both(
        self, ours: Task, theirs: Callable[[Any], Task], *tokens: np.ndarray, peer: Any = None
    ) -> dict[str, Task]:
        peer = self.peer if peer is None else peer
        if peer is None:
            return {"tljax": ours}
        return {"tljax": ours, "torch": theirs([peer.tokens(one) for one in tokens])}

    def _forward(self, batch: int, pos: int) -> dict[str, Task]:
        tokens, peer = self.tokens(batch, pos), self.peer
        run = lambda _: jax.block_until_ready(self.model(tokens))  # noqa: E731
        return self._both(run, lambda given: lambda _: peer.forward(*given), tokens)

    def _narrow(self, batch: int, pos: int, path: str) -> dict[str, Task]:
        tokens, peer = self.tokens(batch, pos), self.narrow_peer
        model = self.narrow.replace(cfg=self.narrow.cfg.replace(attention_path=path))
        run = lambda _: jax.block_until_ready(model(tokens))  # noqa: E731
        return self._both(run, lambda given: lambda _: peer.forward(*given), tokens, peer=peer)

    def _cache(self) -> dict[str, Task]:
        tokens, peer = self.tokens(1, 16 if self.small else 128), self.peer

        def run(_: int) -> Any:
            logits, cache = self.model.run_with_cache(tokens)
            return jax.block_until_ready((logits, dict(cache)))

        return self._both(run, lambda given: lambda _: peer.cached(*given), tokens)

    def _hooked(self) -> dict[str, Task]:
        tokens, peer = self.tokens(1, 16), self.peer

        def run(number: int) -> Any:
            layer, pos = number * 5 % self.shape["n_layers"], number * 7 % 16
            hook = (f"blocks.{layer}.hook_resid_post", lambda x, hook: x.at[:, pos].multiply(0.5))
            return jax.block_until_ready(self.model.run_with_hooks(tokens, fwd_hooks=[hook]))

        return self._both(run, lambda given: lambda number: peer.hooked(*given, number), tokens)

    def _sweep(self) -> dict[str, Task]:
        length, peer = 8 if self.small else 15, self.peer
        tokens, clean, metric = self.tokens(1, length), self.tokens(1, length, 1), LogitDiff(3, 4)
        run = lambda _: sweep(self.model, tokens, clean, metric, "resid_pre", progress=False)  # noqa: E731
        return self._both(run, lambda given: lambda _: peer.sweep(*given), tokens, clean)

    def _generate(self, batch: int) -> dict[str, Task]:
        n_new, peer = 8 if self.small else 64, self.peer
        tokens, options = self.tokens(batch, 8 if self.small else 32), {"do_sample": False, "stop_at_eos": False}

        def run(_: int) -> Any:
            made = self.model.generate(
                tokens, max_new_tokens=n_new, return_type="tokens", verbose=False, **options  # type: ignore[arg-type]
            )  # fmt: skip
            return jax.block_until_ready(made)

        return self._both(run, lambda given: lambda _: peer.generate(*given, n_new), tokens)

    def _edges(self) -> dict[str, Task]:
        from tljax.circuits import edge_scores

        batch, pos = (1, 6) if self.small else (8, 15)
        clean, corrupted = self.tokens(batch, pos), self.tokens(batch, pos, 1)
        options: dict[str, Any] = {"method": "eap-ig", "steps": 2 if self.small else 5, "progress": False}
        run = lambda _: edge_scores(self.model, clean, corrupted, LogitDiff(3, 4), **options).values  # noqa: E731
        return {"tljax": lambda number: jax.block_until_ready(run(number))}

    def _dictionary(self) -> dict[str, Task]:
        from tljax.dictionaries.training import Preparation, TrainingConfig, initial_parameters
        from tljax.dictionaries.training.coefficients import numbers_of, structure_of
        from tljax.dictionaries.training.step import initial_state, train_step

        rows, width, features = (64, 32, 128) if self.small else (4096, 768, 12288)
        cfg = TrainingConfig(architecture="batchtopk", k=8, d_in=width, d_sae=features)
        x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((rows, width), np.float32))
        state = jax.tree.map(jax.numpy.array, initial_state(initial_parameters(cfg), cfg, None))
        numbers, structure = numbers_of(cfg, 1000), structure_of(cfg, cfg.k)

        def run(_: int) -> Any:
            nonlocal state
            state, metrics = train_step(state, x, None, numbers, Preparation(), structure, None)
            return jax.block_until_ready((state, metrics))

        return {"tljax": run}

    def _harvest(self) -> dict[str, Task]:
        from tljax.harvest import harvest

        batch, pos = (2, 16) if self.small else (8, 256)
        rows, point = self.tokens(4 * batch, pos).tolist(), ("resid_post", self.shape["n_layers"] // 2)

        def run(_: int) -> Any:
            there = Path(tempfile.mkdtemp(dir=self.directory)) / "store"
            return harvest(
                self.model, rows, point, there, batch_size=batch, context_size=pos, prepend_bos=False, progress=False
            )  # fmt: skip

        return {"tljax": run}


def _peer(shape: dict[str, Any], dtype: str) -> Any:
    """Torch on the device that jax uses, or ``None``."""
    if any(util.find_spec(name) is None for name in ("torch", "transformers")):
        return None
    import torch

    platform = jax.devices()[0].platform
    if platform not in ("cpu", "gpu") or (platform == "gpu" and not torch.cuda.is_available()):
        return None
    from _accelerator_peers import Peer

    return Peer(shape, "cuda" if platform == "gpu" else "cpu", dtype)
