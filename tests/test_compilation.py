"""What compiles: one block program for all layers, and nothing again for new numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import TOKENS, build

from tljax import Add, HookedTransformer, Noise, Replace, Scale, Zero
from tljax.config import BOOKKEEPING
from tljax.forward.stages import _apply_compiled
from tljax.patching import LogitDiff, sweep

# a shape of its own, so that no other test has compiled anything here before
OWN_TOKENS = TOKENS[:, :5]
LAYERS = 4


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return build("gpt2", n_layers=LAYERS)


@pytest.fixture
def no_compilation(compilations: Any) -> Iterator[Callable[[], None]]:
    """Call it when warm: from then on nothing may compile."""
    start: list[int] = []
    yield lambda: start.append(compilations.count)
    assert start, "the test never said that it is warm"
    assert compilations.count == start[0]


def programs(run: Callable[[], Any]) -> int:
    """How many stage programs a call adds."""
    before = _apply_compiled._cache_size()
    run()
    return _apply_compiled._cache_size() - before


def test_layers_share_one_block_program(model: HookedTransformer) -> None:
    assert programs(lambda: model(OWN_TOKENS)) == 3
    assert programs(lambda: model(OWN_TOKENS[:, ::-1])) == 0
    assert programs(lambda: model.run_with_cache(OWN_TOKENS)) == 3
    assert programs(lambda: model(OWN_TOKENS, stop_at_layer=2)) == 0
    assert programs(lambda: model.run_with_cache(OWN_TOKENS, names_filter=["resid_post0", "resid_post2"])) == 1


def test_local_layers_cost_one_program_a_kind() -> None:
    model = build("local", n_layers=LAYERS, attn_types=("global", "local") * 2)
    assert programs(lambda: model(OWN_TOKENS)) == 4


def test_inverse_layer_scale_is_data() -> None:
    model = build("inverse_scale", n_layers=LAYERS)
    assert programs(lambda: model(OWN_TOKENS)) == 3


def test_intervention_numbers_and_layers_are_data(model: HookedTransformer, no_compilation: Callable) -> None:
    def run(layer: int, value: Any, pos: Any, head: Any) -> None:
        model.run_with_hooks(OWN_TOKENS, fwd_hooks=[(("z", layer), Replace(value, pos=pos, head=head))])

    run(0, 1.0, 0, 0)
    run(LAYERS - 1, 1.0, 0, 0)
    no_compilation()
    for layer in range(LAYERS):
        run(layer, float(layer), layer, -layer - 1)
        run(layer, layer, np.int64(layer), layer)


def test_array_values_are_data(model: HookedTransformer, no_compilation: Callable) -> None:
    def run(layer: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        value, positions = rng.standard_normal((2, 16)), rng.permutation(5)[:2]
        mask = rng.random((1, 5, 1)) > 0.5
        hooks = [
            (("resid_mid", layer), Add(value, pos=positions)),
            (("resid_mid", layer), Scale(rng.random(), mask=mask)),
            (("mlp_out", layer), Noise(rng.random(), seed)),
            (("pattern", layer), Zero(head=rng.random(4) > 0.5)),
        ]
        model.run_with_hooks(OWN_TOKENS, fwd_hooks=hooks)

    run(0, 0)
    no_compilation()
    for seed in range(1, 4):
        run(seed, seed)


def test_fresh_closures_compile_nothing(model: HookedTransformer, no_compilation: Callable) -> None:
    def run(name: str, amount: float) -> None:
        factor = jnp.asarray(amount, jnp.float32)
        model.run_with_hooks(OWN_TOKENS, fwd_hooks=[(name, lambda x, hook: x * factor)])

    names = [
        "blocks.1.attn.hook_z",
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_resid_post",
        "hook_embed",
        "unembed.hook_out",
    ]
    for name in names:
        run(name, 1.0)
    no_compilation()
    for amount in (2.0, 3.0):
        for name in names:
            run(name, amount)


def test_closures_at_another_layer_compile_nothing(model: HookedTransformer, no_compilation: Callable) -> None:
    def run(layer: int) -> None:
        model.run_with_hooks(OWN_TOKENS, fwd_hooks=[(("mlp_post", layer), lambda x, hook: np.asarray(x) * 2)])

    run(0)
    no_compilation()
    for layer in range(LAYERS):
        run(layer)


def test_partials_carry_their_arrays(model: HookedTransformer, no_compilation: Callable) -> None:
    def double(factor: jax.Array, x: jax.Array, hook: Any) -> jax.Array:
        return x * factor

    def run(amount: float) -> np.ndarray:
        hook = jax.tree_util.Partial(double, np.float32(amount))
        return np.asarray(model.run_with_hooks(OWN_TOKENS, fwd_hooks=[("z1", hook)]))

    outputs = [run(1.0)]
    no_compilation()
    outputs += [run(2.0), run(3.0)]
    for amount, output in zip((1.0, 2.0, 3.0), outputs, strict=True):
        np.testing.assert_allclose(output, run(amount))
    assert np.abs(outputs[1] - outputs[0]).max() > 1e-3


def test_calls_repeat_for_free(model: HookedTransformer, no_compilation: Callable) -> None:
    other_model = model.replace(params=jax.tree.map(lambda x: np.asarray(x) * np.float32(0.5), model.params))
    runs: list[Callable[[Any], Any]] = [
        model,
        lambda t: model(t, return_type="both"),
        lambda t: model(t, return_type="loss", loss_per_token=True),
        lambda t: model.run_with_cache(t),
        lambda t: model.run_with_cache(t, pos_slice=-1),
        lambda t: model.run_with_cache(t, names_filter=lambda name: "resid" in name),
        lambda t: model.run_with_hooks(t, fwd_hooks=[("z0", Zero(head=1))]),
        lambda t: model.input_to_embed(t),
        lambda t: other_model(t),
    ]
    for run in runs:
        run(OWN_TOKENS)
    no_compilation()
    for run in runs:
        run(OWN_TOKENS[:, ::-1])


def test_another_position_slice_of_the_same_length_compiles_nothing(
    model: HookedTransformer, no_compilation: Callable
) -> None:
    model.run_with_cache(OWN_TOKENS, names_filter="resid_post0", pos_slice=0)
    no_compilation()
    for pos in (1, -1, [3]):
        model.run_with_cache(OWN_TOKENS, names_filter="resid_post0", pos_slice=pos)


def test_a_users_jit_compiles_once_for_all_values(model: HookedTransformer, no_compilation: Callable) -> None:
    run = jax.jit(lambda m, t, i: m.run_with_hooks(t, fwd_hooks=[("z1", i)]))
    run(model, OWN_TOKENS, Replace(1.0, pos=0))
    no_compilation()
    run(model, OWN_TOKENS[::-1], Replace(2.0, pos=3))
    run(model, OWN_TOKENS[::-1], Replace(5, pos=-1))


CHANGES: dict[str, Any] = {
    "init_mode": "xavier_normal", "initializer_range": 0.5, "init_weights": False, "seed": 5, "tokenizer_name": "other",
    "tokenizer_prepends_bos": True, "default_prepend_bos": False, "eos_token_ids": (3,), "bos_token_id": 2,
    "pad_token_id": 1, "weight_processing": ("center_unembed",), "model_name": "fine-tuned",
    "original_architecture": "Other", "use_attn_result": True, "use_split_qkv_input": True, "use_attn_in": True,
    "use_hook_mlp_in": True, "use_hook_tokens": True,
}  # fmt: skip


def test_bookkeeping_compiles_nothing(model: HookedTransformer, no_compilation: Callable) -> None:
    assert set(CHANGES) == set(BOOKKEEPING)
    names = ["resid_post0", "pattern1", "resid_post3", "ln_final.hook_scale"]

    def use(model: HookedTransformer) -> None:
        _, cache = model.run_with_cache(OWN_TOKENS, names_filter=names)
        cache.logit_attrs(cache["resid_post", 3][None], tokens=3)
        sweep(model, OWN_TOKENS, OWN_TOKENS[:, ::-1], LogitDiff(1, 2), "resid_pre", progress=False)
        model.generate(OWN_TOKENS, max_new_tokens=2, do_sample=False, stop_at_eos=False, verbose=False)

    use(model)
    no_compilation()
    for name, value in CHANGES.items():
        renamed = model.replace(cfg=model.cfg.replace(**{name: value}))
        assert renamed.cfg != model.cfg
        assert renamed.cfg.computation is model.cfg.computation
        use(renamed)
    assert model.cfg.replace(eps=1e-3).computation != model.cfg.computation


def test_another_seed_draws_by_the_same_programs(model: HookedTransformer, no_compilation: Callable) -> None:
    HookedTransformer(model.cfg.replace(seed=1, init_weights=True))
    no_compilation()
    HookedTransformer(model.cfg.replace(seed=2, init_weights=True, model_name="another"))
