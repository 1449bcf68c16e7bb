"""A dictionary on another form of its model gives the features it gave, or is refused; a self-check tells the rest."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.dictionaries import (
    Dictionary,
    DictionaryConfig,
    Tap,
    UnknownModelWarning,
    check_dictionary,
    fit_to,
    fold_activation_norm,
)  # fmt: skip
from tljax.errors import DictionaryError

D, F = 16, 24
TOKENS = np.random.default_rng(5).integers(0, 30, (3, 8))
RESID, Z, NORMALIZED, AFTER, OUT = (
    f"blocks.1.{name}"
    for name in ("hook_resid_pre", "attn.hook_z", "ln2.hook_normalized", "mlp.hook_in", "hook_mlp_out")
)
RAW, CENTRED = (), ("center_writing_weights",)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HookedTransformer]:
    """One model with all parameters random: raw, and processed as by default."""
    cfg = HookedTransformerConfig(
        d_model=D, n_heads=2, n_layers=2, n_ctx=16, d_vocab=30, d_mlp=20, act_fn="gelu", normalization_type="LN", seed=0
    )
    model = HookedTransformer(cfg)
    leaves, tree = jax.tree.flatten(model.params)
    draw = np.random.default_rng(1)
    params = jax.tree.unflatten(tree, [draw.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    path = tmp_path_factory.mktemp("models") / "gpt2"
    HookedTransformer(cfg, params=params).save_pretrained(path)
    load = HookedTransformer.from_pretrained
    return {"raw": HookedTransformer.from_pretrained_no_processing(path), "processed": load(path)}


def made(
    reads: str, processing: Any = RAW, *, arch: str = "standard", writes: str | None = None, **cfg: Any
) -> Dictionary:
    draw = np.random.default_rng(2)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), (F,)) if arch == "gated" else {"b_enc": (F,)}
    shapes |= {"W_skip": (D, D)} if writes is not None else {}
    tap = Tap(reads=reads, writes=writes, processing=processing, gain=cfg.pop("gain", None))
    cfg = {"apply_b_dec_to_input": writes is None} | cfg
    made_cfg = DictionaryConfig(architecture=arch, d_in=D, d_sae=F, transcoder=writes is not None, tap=tap, **cfg)
    return Dictionary({name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}, made_cfg)


def at(model: HookedTransformer, name: str) -> jax.Array:
    return model.run_with_cache(TOKENS, return_type=None, names_filter=[name])[1][name]


def assert_close(got: Any, right: Any) -> None:
    right = np.asarray(right)
    np.testing.assert_allclose(np.asarray(got), right, rtol=0, atol=3e-5 * np.abs(right).max())


@pytest.mark.parametrize("arch", ["standard", "gated"])
@pytest.mark.parametrize("subtracts", [True, False])
def test_of_centred_activations_on_a_raw_model(
    models: dict[str, HookedTransformer], arch: str, subtracts: bool
) -> None:
    dictionary = made(RESID, CENTRED, arch=arch, apply_b_dec_to_input=subtracts)
    centred, raw = at(models["processed"], RESID), at(models["raw"], RESID)
    assert np.abs(raw.mean(axis=-1)).max() > 0.1
    fitted = fit_to(dictionary, models["raw"])
    assert_close(fitted.encode(raw), dictionary.encode(centred))
    assert_close(raw - fitted.forward(raw), centred - dictionary.forward(centred))  # the error is what it was
    assert_close(fitted.decode(fitted.encode(raw), raw), fitted.forward(raw))
    assert fitted.cfg.tap.processing == RAW
    assert fit_to(dictionary, models["processed"]).params == dictionary.params


def test_of_raw_activations_on_a_centred_model(models: dict[str, HookedTransformer]) -> None:
    with pytest.raises(DictionaryError, match=r"The mean .* is gone.*from_pretrained_no_processing\('gpt2'\)"):
        fit_to(made(RESID), models["processed"])
    with pytest.raises(DictionaryError, match="depends on the mean"):
        fit_to(made(RESID, CENTRED, normalize_activations="constant_norm_rescale"), models["raw"])
    normalised = made(RESID, normalize_activations="layer_norm")
    raw, centred = at(models["raw"], RESID), at(models["processed"], RESID)
    fitted = fit_to(normalised, models["processed"])
    assert_close(fitted.encode(centred), normalised.encode(raw))
    assert_close(centred - fitted.forward(centred), raw - normalised.forward(raw))


def test_a_transcoder_writes_what_a_centred_model_writes(models: dict[str, HookedTransformer]) -> None:
    transcoder = made(NORMALIZED, writes=OUT)
    x = at(models["processed"], NORMALIZED)
    assert_close(x, at(models["raw"], NORMALIZED))
    fitted, right = fit_to(transcoder, models["processed"]), transcoder(x)
    assert_close(fitted.encode(x), right.features)
    assert_close(fitted.forward(x), right.reconstruction - right.reconstruction.mean(axis=-1, keepdims=True))
    with pytest.raises(DictionaryError, match="mean of what it is to write"):
        fit_to(made(NORMALIZED, CENTRED, writes=OUT), models["raw"])
    assert fit_to(made(NORMALIZED, CENTRED, writes=OUT), models["processed"]).cfg.tap.writes == OUT


@pytest.mark.parametrize("arch", ["standard", "gated"])
def test_the_gain_of_a_norm_is_folded(models: dict[str, HookedTransformer], arch: str) -> None:
    after, before = at(models["raw"], AFTER), at(models["raw"], NORMALIZED)
    transcoder = made(AFTER, writes=OUT, arch=arch)
    right = transcoder(after)
    for fitted in (
        fit_to(transcoder, models["raw"], reads=NORMALIZED),
        fit_to(made(NORMALIZED, writes=OUT, arch=arch, gain=True), models["raw"]),
    ):
        assert fitted.cfg.tap.reads == NORMALIZED
        assert_close(fitted.encode(before), right.features)
        assert_close(fitted.forward(before), right.reconstruction)
    assert fit_to(transcoder, models["raw"]).cfg.tap.reads == AFTER
    with pytest.raises(DictionaryError, match="gain of the norm is folded"):
        fit_to(transcoder, models["processed"])
    with pytest.raises(DictionaryError, match="fold_ln=False"):
        fit_to(made(NORMALIZED, None, writes=OUT, gain=True), models["processed"])
    folded = fit_to(made(AFTER, ("fold_ln",), writes=OUT), models["raw"])  # trained where the gain was folded away
    assert folded.cfg.tap.reads == NORMALIZED
    assert_close(folded.encode(before), right.features if arch == "none" else made(AFTER, writes=OUT).encode(before))
    with pytest.raises(DictionaryError, match="no other form of"):
        fit_to(made(RESID), models["raw"], reads=NORMALIZED)
    with pytest.raises(DictionaryError, match="only a transcoder"):
        fit_to(made(AFTER), models["raw"], reads=NORMALIZED)


@pytest.mark.parametrize(("arch", "subtracts"), [("standard", True), ("standard", False), ("gated", False)])
def test_value_biases_and_heads(models: dict[str, HookedTransformer], arch: str, subtracts: bool) -> None:
    folded = made(Z, ("fold_ln", "fold_value_biases"), arch=arch, apply_b_dec_to_input=subtracts)
    raw_z, folded_z = at(models["raw"], Z), at(models["processed"], Z)
    assert raw_z.ndim == 4
    fitted = fit_to(folded, models["raw"])
    assert fitted.cfg.tap.merged_heads
    merged = folded_z.reshape(*folded_z.shape[:2], D)
    assert_close(fitted.encode(raw_z), folded.encode(merged))
    assert_close(raw_z - fitted.forward(raw_z), (merged - folded.forward(merged)).reshape(raw_z.shape))
    alone = fit_to(made(Z, ("fold_value_biases",)), models["raw"])
    bias = models["raw"].params["blocks"][1]["attn"]["b_V"]
    assert_close(alone.encode(raw_z), made(Z).encode((raw_z - bias[None, None]).reshape(merged.shape)))
    with pytest.raises(DictionaryError, match="value biases are folded and gone"):
        fit_to(made(Z), models["processed"])


def test_what_does_not_belong_is_refused(models: dict[str, HookedTransformer]) -> None:
    model = models["raw"]
    for reads, says in {
        "blocks.7.hook_resid_pre": r"none of this model.*layers 0 to 1|none of this model",
        "blocks.1.hook_resid_prex": "none of this model.*hook_resid_pre",
        "blocks.1.mlp.hook_pre": "reads 16 numbers at blocks.1.mlp.hook_pre.*is 20 wide",
    }.items():
        with pytest.raises(DictionaryError, match=says):
            fit_to(made(reads), model)
    with pytest.raises(DictionaryError, match=r"do not say which hook point it reads.*reads="):
        fit_to(made("x").replace(cfg=DictionaryConfig(d_in=D, d_sae=F)), model)
    with pytest.raises(DictionaryError, match="comes before what it reads"):
        fit_to(made(NORMALIZED, writes="blocks.0.hook_mlp_out"), model)
    unscaled = made(RESID, normalize_activations="expected_average_only_in")
    with pytest.raises(DictionaryError, match="norm_scaling_factor="):
        fit_to(unscaled, model)
    assert fit_to(fold_activation_norm(unscaled, 2.0), model).cfg.normalize_activations == "none"


def test_names_of_models(models: dict[str, HookedTransformer]) -> None:
    def named(name: str) -> Dictionary:
        plain = made(RESID)
        return plain.replace(cfg=plain.cfg.replace(tap=plain.cfg.tap.replace(model_name=name)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("gpt2-small", "gpt2", "openai-community/gpt2", "GPT2-Small"):
            fit_to(named(name), models["raw"])
    with pytest.raises(DictionaryError, match="is of pythia-70m, and this model is gpt2"):
        fit_to(named("pythia-70m"), models["raw"])
    fit_to(named("pythia-70m"), models["raw"], any_model=True)
    with pytest.warns(UnknownModelWarning, match="of 'mine'"):
        fit_to(named("mine"), models["raw"])


def test_a_square_transposed_dictionary_is_found(tmp_path: Path) -> None:
    model = HookedTransformer.from_pretrained_no_processing("tljax-tiny")
    d, reads = model.cfg.d_model, "blocks.2.hook_resid_pre"
    x = model.run_with_cache("John and Mary went to the store, and John gave a drink to Mary.", names_filter=[reads])[
        1
    ][reads]
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0].astype(np.float32)
    bias = np.full(d, 2 * np.abs(np.asarray(x)).max() * d**0.5, np.float32)  # all features are active: x is explained
    params = {"W_enc": turned, "b_enc": bias, "W_dec": turned.T, "b_dec": -bias @ turned.T}
    tap = Tap(reads=reads, model_name="tljax-tiny", processing=())
    right = Dictionary(params, DictionaryConfig(d_in=d, d_sae=d, apply_b_dec_to_input=False, tap=tap))
    prompt = "When the girl and the boy went to the park, they saw a dog and gave it a ball to play with."
    right.save(tmp_path / "right")
    assert check_dictionary(right, model, prompt).fvu < 0.01
    Dictionary.from_pretrained(tmp_path / "right", model=model, prompt=prompt)
    wrong = right.replace(params=params | {"W_enc": turned.T})
    wrong.save(tmp_path / "wrong")
    with pytest.raises(DictionaryError, match=r"does not explain.*FVU .*transposed square matrix"):
        Dictionary.from_pretrained(tmp_path / "wrong", model=model, prompt=prompt)
    found = check_dictionary(wrong, model, prompt, on_failure="return")
    assert found.fvu > 0.9
    assert found.l0 == d
    with pytest.raises(DictionaryError, match="64 features are active for each token, and 10 are stated"):
        check_dictionary(right, model, prompt, l0=10)
    assert check_dictionary(right, model, [prompt, "A cat."], l0=30).tokens > found.tokens
    with pytest.raises(DictionaryError, match="the check needs 8"):
        check_dictionary(right, model, "A cat.")


def test_converted_dictionaries_stay_pytrees(models: dict[str, HookedTransformer]) -> None:
    fitted = fit_to(made(RESID, CENTRED), models["raw"])
    x = at(models["raw"], RESID)
    assert_close(jax.jit(lambda one, x: one(x).reconstruction)(fitted, x), fitted.forward(x))
    with pytest.raises(DictionaryError, match="as it was loaded"):
        fitted.save("/nowhere")
    assert jnp.isfinite(jax.grad(lambda one: one(x).reconstruction.sum())(fitted).params["W_enc"]).all()
