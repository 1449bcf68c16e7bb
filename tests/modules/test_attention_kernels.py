"""Kernels of attention: the splash kernel interpreted on the CPU, and the call that cuDNN gets computed by XLA.

The kernels stand in for what they are: on the CPU and in float32, which on their own devices they do not take, so that
whole models run through them and the numbers show any mistake in masks, scales, layouts, padding and derivatives.
"""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.attention_kernels import KERNELS
from tljax.config import LayerKind
from tljax.modules import attention_path as paths
from tljax.modules import kernels
from tljax.modules.blockwise import Heads, attend_by_blocks
from tljax.modules.scores import Places

SIZES = {
    "d_model": 16, "n_layers": 1, "n_heads": 4, "n_key_value_heads": 2, "d_head": 8, "d_mlp": 8, "n_ctx": 300,
    "d_vocab": 11, "act_fn": "gelu", "seed": 1, "initializer_range": 0.3, "positional_embedding_type": "rotary",
    "attn_scale": 2.0,
}  # fmt: skip
LOCAL = {"use_local_attn": True, "window_size": 7, "attn_types": ["local"]}
CASES = {
    "cudnn": ("cudnn", LOCAL, False),
    "cudnn, both directions": ("cudnn", {"attention_dir": "bidirectional", "n_key_value_heads": None}, False),
    "splash": ("splash", LOCAL | {"attn_scores_soft_cap": 0.5}, True),
}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 11, (3, 140)).astype(np.int32)
MASK = np.ones((3, 140), bool)
MASK[0, :60] = MASK[1, 70:] = MASK[2, 40:60] = False
INSTEAD = {"cudnn": {"implementation": "xla"}, "splash": {"interpret": True}}


@contextmanager
def on_the_cpu(name: str) -> Iterator[list[str]]:
    """A kernel as one of the CPU's, for float32; yields a list that grows whenever it is traced.

    Programs made meanwhile stay in jax's caches: no other test has a config like these.
    """
    kernel, run, traced = KERNELS[name], kernels.FUNCTIONS[name], []

    def noted(*args: object) -> jax.Array:
        traced.append(name)
        return run(*args, **INSTEAD[name])

    here = dataclasses.replace(kernel, backend="cpu", platform="cpu", dtypes=("float32",))
    with (
        mock.patch.dict(KERNELS, {name: here}),
        mock.patch.dict(kernels.FUNCTIONS, {name: noted}),
        mock.patch.object(paths, "cudnn_refusal", return_value=None),
    ):
        yield traced


@pytest.mark.parametrize(("name", "changes", "padded"), CASES.values(), ids=CASES)
def test_a_model_by_a_kernel(name: str, changes: dict, padded: bool) -> None:
    """Logits of prompts padded left, right and inside, gradients, and a derivative forward."""
    model = HookedTransformer(HookedTransformerConfig(**(SIZES | changes)))
    mask = MASK if padded else None

    def run(model: HookedTransformer) -> object:
        def loss(params: object) -> object:
            logits, loss = model.replace(params=params)(TOKENS, return_type="both", attention_mask=mask)
            return loss, logits

        (value, logits), pullback = jax.value_and_grad(loss, has_aux=True)(model.params)
        forward = jax.jvp(loss, (model.params,), (model.params,), has_aux=True)[1] if not padded else None
        return jax.tree.leaves((value, logits, pullback, forward))

    whole = jax.jit(run)(model.replace(cfg=model.cfg.replace(attention_path="materialised")))
    with on_the_cpu(name) as traced:
        kernel = model.replace(cfg=model.cfg.replace(attention_path=name))
        assert {path.name for path in kernel.attention_path(140, padded=padded)} == {name}
        found = jax.jit(run)(kernel)
        assert traced
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=0), whole, found)


def test_bfloat16_beside_float64() -> None:
    """The splash kernel rounds what it reads and its answer alone; blocks round scores too, as transformers does."""
    cfg = HookedTransformerConfig(**(SIZES | {"dtype": "bfloat16", "d_head": 24, "attn_scale": 24**0.5}))
    q, k, v = (jnp.asarray(RNG.standard_normal((1, 130, heads, 24)), "bfloat16") for heads in (4, 2, 2))
    wide_q, wide_k, wide_v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqkge,bske->bkgqs", wide_q.reshape(1, 130, 2, 2, 24), wide_k) / cfg.attn_scale
    weights = np.exp(np.where(np.tri(130, dtype=bool), scores, -np.inf))
    exact = np.einsum("bkgqs,bske->bqkge", weights / weights.sum(-1, keepdims=True), wide_v).reshape(1, 130, 4, 24)
    kernel = jax.jit(functools.partial(kernels.splash_attention, cfg, LayerKind(), interpret=True))(q, k, v, None)
    pos = jnp.arange(130, dtype=jnp.int32)
    heads, places = Heads.of(q, k, v, "bske", None, None), Places(pos, pos, None, None)
    blocks = attend_by_blocks(cfg, LayerKind(), heads, places, None, in_order=True)
    for found, bound in ((kernel, 2**-8), (blocks, 2**-6)):
        assert found.dtype == jnp.bfloat16
        assert 0 < np.abs(np.asarray(found, np.float64) - exact).max() <= bound * np.abs(exact).max()


@pytest.mark.parametrize("axes", [(0, None, None), (None, 1, 0), (0, 0, 0)])
def test_vmap_over_some_arguments_of_cudnn(axes: tuple) -> None:
    cfg = HookedTransformerConfig(**SIZES)
    attend = functools.partial(kernels.cudnn_attention, cfg, LayerKind(), token_mask=None, implementation="xla")
    shapes = [(2, 9, heads, 8) for heads in (4, 2, 2)]
    arrays = [RNG.standard_normal(s if a is None else (*s[:a], 3, *s[a:])) for s, a in zip(shapes, axes, strict=True)]
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    found = jax.jit(jax.vmap(attend, in_axes=axes))(*arrays)
    for n in range(3):
        one = [x if a is None else jnp.take(x, n, a) for x, a in zip(arrays, axes, strict=True)]
        np.testing.assert_allclose(found[n], attend(*one), atol=1e-6, rtol=0)


def test_which_path_on_which_device() -> None:
    """By device, dtype, length, padding and what the layer needs; with the reason."""
    wide = HookedTransformerConfig(**(SIZES | LOCAL))
    cfg = wide.replace(dtype="bfloat16")

    def told(cfg: HookedTransformerConfig, backend: str, keys: int = 300, devices: int = 1, **changes: bool) -> str:
        with (
            mock.patch.object(jax, "default_backend", return_value=backend),
            mock.patch.object(jax, "device_count", return_value=devices),
            mock.patch.object(paths, "cudnn_refusal", return_value=None),
        ):
            path = paths.attention_path(cfg, LayerKind(local=True), keys, keys, False, **changes)
            return f"{path.name}: {path.on_default_device().name}, {path.why}"

    assert told(cfg, "gpu").startswith("cudnn: cudnn")
    assert told(cfg, "tpu").startswith("splash: splash")
    assert told(cfg, "cpu").startswith("blockwise: blockwise")
    assert told(cfg, "gpu", keys=256).startswith("materialised")
    assert "dtype is float32" in told(wide, "gpu")
    assert "cannot leave out padding" in told(cfg, "gpu", padded=True)
    assert told(cfg, "tpu", padded=True).startswith("splash")
    assert "keys are cached or packed" in told(cfg, "tpu", whole=False)
    assert "over 4 devices" in told(cfg, "tpu", devices=4)
    assert told(cfg, "gpu", devices=4).startswith("cudnn")
    assert "soft cap" in told(cfg.replace(attn_scores_soft_cap=5.0), "gpu")
    assert "window in both directions" in told(cfg.replace(attention_dir="bidirectional"), "gpu")
    assert "d_head is 12" in told(cfg.replace(d_head=12), "gpu")
    asked = cfg.replace(attention_path="splash")
    assert told(asked, "tpu", keys=20, devices=4).startswith("splash: splash")
    assert told(asked, "gpu").startswith("splash: blockwise")
    assert "runs on a TPU; this is a cpu" in HookedTransformer(asked).attention_path(20)[0].why


def test_what_cudnn_says_of_this_machine() -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("for machines without a GPU")
    model = HookedTransformer(HookedTransformerConfig(**(SIZES | {"dtype": "bfloat16", "attention_path": "cudnn"})))
    (path,) = model.attention_path(20)
    assert path.name == "blockwise"
    assert "jax says cuDNN is not detected" in path.why or "runs on a GPU" in path.why
    assert bool(jnp.isfinite(model(TOKENS)).all())


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_programs_for_other_devices(name: str) -> None:
    """The same traced function has the kernel on its own devices and none on others; with all that cuDNN is told."""
    cfg = HookedTransformerConfig(**(SIZES | LOCAL | {"dtype": "bfloat16", "d_head": 64, "attn_scale": 5.0}))
    pos = jnp.arange(300, dtype=jnp.int32)
    shapes = [jax.ShapeDtypeStruct((2, 300, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    call = {"cudnn": "__cudnn$fmhaSoftmax", "splash": "tpu_custom_call"}[name]
    allowed = [jax.export.DisabledSafetyCheck.custom_call(call)]

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return kernels.attend_by_kernel(name, cfg, LayerKind(local=True), q, k, v, Places(pos, pos, None, None))

    with mock.patch("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", return_value=91002):
        for platform in ("cpu", "cuda", "tpu"):
            text = jax.export.export(attend, platforms=(platform,), disabled_checks=allowed)(*shapes).mlir_module()
            assert (call in text) == (platform == KERNELS[name].platform)
            if call in text and name == "cudnn":
                settings = text.replace("\\22", '"').replace(" ", "")
                assert '"fmha_scale":0.2' in settings
                assert '"mask_type":"CAUSAL"' in settings
                assert '"sliding_window_length":7' in settings


def test_auto_exports_from_here_for_every_platform() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("programs with a kernel in them are exported for one platform at a time")
    model = HookedTransformer(HookedTransformerConfig(**(SIZES | {"dtype": "bfloat16"})))
    tokens = jax.ShapeDtypeStruct((1, 300), jnp.int32)
    exported = jax.export.export(jax.jit(lambda t: model(t)), platforms=("cpu", "cuda", "tpu"))(tokens)
    assert exported.platforms == ("cpu", "cuda", "tpu")
