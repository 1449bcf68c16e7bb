"""YaRN, long rope and dynamic NTK: tables and switches against transformers, lengths, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import hf_config, make_hf_model, rewrite
from read_config import read_attributes
from variants import randomised_params

from tljax import Batch, HookedTransformer, HookedTransformerConfig
from tljax.checkpoints.formats.hf_config import HFConfig, rope_scaling, yarn_mscale
from tljax.config import LayerKind
from tljax.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from tljax.modules.rotary import attention_factor, inverse_frequencies
from tljax.patching import LogitDiff, sweep

torch = pytest.importorskip("torch")

SIZES = {
    "hidden_size": 192, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 10,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
}  # fmt: skip
STRETCHES = np.linspace(1, 60, 48).tolist()
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6},
    "gpt-oss": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096, "rope_theta": 150000.0},
    "olmo": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836, "rope_theta": 5e5,
             "original_max_position_embeddings": 8192, "beta_fast": 32, "beta_slow": 1},
    "deepseek": {"rope_type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.9, "rope_theta": 10000.0,
                 "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1},
    "one step": {"rope_type": "yarn", "factor": 3.0, "beta_fast": 3.0, "beta_slow": 3.0, "truncate": False,
                 "original_max_position_embeddings": 4096, "rope_theta": 1e4},
    "not stretched": {"rope_type": "yarn", "factor": 1.0, "rope_theta": 1e4},
    "phi": {"rope_type": "longrope", "short_factor": [1.1] * 48, "long_factor": STRETCHES, "rope_theta": 1e4,
            "original_max_position_embeddings": 4096},
    "phi with a factor": {"rope_type": "longrope", "short_factor": STRETCHES[::-1], "long_factor": STRETCHES,
                          "rope_theta": 1e4, "original_max_position_embeddings": 4096, "factor": 16.0},
    "phi unsharpened": {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": STRETCHES,
                        "rope_theta": 1e4, "original_max_position_embeddings": 131072},
    "dynamic": {"rope_type": "dynamic", "factor": 1.7, "rope_theta": 5e5},
    "llama 3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}  # fmt: skip
TOKENS = np.random.default_rng(5).integers(2, 40, (2, 24)).astype(np.int32)
SWITCH = 6
LONGROPE: dict[str, Any] = {
    "d_model": 16, "n_layers": 2, "n_heads": 2, "n_ctx": 24, "d_vocab": 40, "act_fn": "silu", "gated_mlp": True,
    "normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_base": 30.0,
    "longrope_short_factor": (1.0, 1.2, 1.5, 2.0), "longrope_long_factor": (1.5, 3.0, 6.0, 9.0),
    "longrope_attention_factor": 1.3, "longrope_original_max_position_embeddings": SWITCH,
}  # fmt: skip
GREEDY: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False}


def read(rope: dict[str, Any], **changes: Any) -> HookedTransformerConfig:
    """Our config of a Llama whose positions are stretched."""
    return read_attributes(SIZES | {"architectures": ["LlamaForCausalLM"], "rope_parameters": rope} | changes)


@pytest.fixture(scope="module")
def longrope() -> HookedTransformer:
    cfg = HookedTransformerConfig(**LONGROPE)
    return HookedTransformer(cfg, params=randomised_params(cfg))


@pytest.mark.parametrize("published", PUBLISHED)
def test_tables_are_those_of_transformers(published: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = PUBLISHED[published]
    theirs = LlamaConfig(**SIZES, rope_parameters=dict(rope))
    cfg = read(rope)
    for is_long in (False, True):
        seq_len = theirs.rope_parameters.get("original_max_position_embeddings", 0) + 1 if is_long else 2
        seq_len = min(seq_len, 131072 if "dynamic" in published else seq_len)
        expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu", seq_len=seq_len)
        frequencies = inverse_frequencies(cfg, is_long=is_long)
        assert frequencies.dtype == np.float32
        np.testing.assert_array_max_ulp(frequencies, expected.numpy(), maxulp=2)
        assert attention_factor(cfg) == factor


@pytest.mark.parametrize("published", PUBLISHED)
def test_what_is_written_is_read_back(published: str) -> None:
    cfg = read(PUBLISHED[published])
    assert read(rope_scaling(cfg) or {}, rope_theta=cfg.rotary_base) == cfg


@pytest.mark.parametrize("published", ["qwen", "phi", "dynamic"])
def test_old_attributes_mean_the_same(published: str) -> None:
    rope = dict(PUBLISHED[published])
    kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
    old = {"rope_scaling": {"type": {"longrope": "su"}.get(kind, kind)} | rope, "rope_theta": theta}
    assert read({}, **old) == read(PUBLISHED[published])


def test_the_original_context_is_found_where_transformers_finds_it() -> None:
    rope = {"rope_type": "yarn", "factor": 2.0}
    assert read(rope).yarn_original_max_position_embeddings == 131072
    rope["original_max_position_embeddings"] = 512
    assert read(rope).yarn_original_max_position_embeddings == 512
    assert read(rope, original_max_position_embeddings=64).yarn_original_max_position_embeddings == 64


def test_mscale() -> None:
    assert yarn_mscale(1.0) == yarn_mscale(0.5, 3.0) == 1.0
    assert yarn_mscale(40.0, 0.5) == pytest.approx(1 + 0.05 * np.log(40))


@pytest.mark.parametrize(
    ("rope", "error", "message"),
    [
        ({"rope_type": "yarn"}, CheckpointError, r"'yarn' without giving 'factor'"),
        ({"rope_type": "yarn", "factor": 0.5}, ConfigError, r"yarn_factor .* at least 1, got 0.5"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": -1.0}, ConfigError, r"yarn_attention_factor.*-1.0"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0}, ConfigError, r"yarn_beta_fast=1.0"),
        ({"rope_type": "yarn", "factor": 2.0, "attn_factor": 1.0}, UnsupportedModelError, r"'attn_factor': 1.0"),
        ({"rope_type": "longrope", "long_factor": [1.0]}, CheckpointError, r"without giving 'short_factor'"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0]}, ConfigError,
         r"longrope_long_factor has 1 entries for 48 rotated pairs"),
        ({"rope_type": "longrope", "short_factor": [0.0] * 48, "long_factor": [1.0] * 48}, ConfigError,
         r"longrope_short_factor must hold positive numbers, got 0.0"),
        ({"rope_type": "dynamic"}, CheckpointError, r"'dynamic' without giving 'factor'"),
        ({"rope_type": "dynamic", "factor": 0.9}, ConfigError, r"dynamic_ntk_factor .* at least 1, got 0.9"),
        ({"rope_type": "longlongrope"}, UnsupportedModelError, r"rope_type='longlongrope'.*yarn, longrope, llama3"),
    ],
)  # fmt: skip
def test_bad_attributes(rope: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(rope)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"longrope_long_factor": None}, r"longrope_long_factor is not set"),
        ({"longrope_attention_factor": 0.0}, r"longrope_attention_factor must be positive"),
        ({"longrope_original_max_position_embeddings": 0}, r"must be an integer of at least 1, got 0"),
        ({"rotary_scaling_factor": 2.0}, r"in one way only, got rotary_scaling_factor, longrope_short_factor and"),
        ({"use_yarn_rope": True}, r"in one way only, got use_yarn_rope, longrope"),
        ({"yarn_global_attn_only": True}, r"yarn_global_attn_only .* set use_yarn_rope too"),
        ({"positional_embedding_type": "none"}, r"needs positional_embedding_type='rotary', got 'none'"),
    ],
)
def test_bad_fields(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HookedTransformerConfig(**(LONGROPE | changes))


def test_dynamic_ntk_needs_its_length() -> None:
    with pytest.raises(ConfigError, match="needs train_seq_length"):
        HookedTransformerConfig(d_model=8, n_layers=1, n_ctx=4, n_heads=2, d_vocab=5,
                                positional_embedding_type="rotary", use_dynamic_ntk_rope=True)  # fmt: skip


def test_a_config_with_long_rope_goes_through_a_dict() -> None:
    cfg = HookedTransformerConfig(**LONGROPE)
    again = HookedTransformerConfig.from_dict(cfg.to_dict())
    assert again == cfg
    assert hash(again) == hash(cfg)
    assert cfg.replace(n_ctx=9).longrope_long_factor == cfg.longrope_long_factor
    half = {"longrope_short_factor": (1.0, 1.2), "longrope_long_factor": (1.0, 2.0)}
    assert cfg.replace(rotary_dim=4, **half).replace(n_ctx=9).rotary_dim == 4


def test_yarn_in_global_layers_only() -> None:
    rope = PUBLISHED["gpt-oss"]
    plain, stretched = read({"rope_theta": rope["rope_theta"]}), read(rope)
    part = stretched.replace(yarn_global_attn_only=True)
    assert not np.array_equal(inverse_frequencies(stretched, LayerKind(local=True)), inverse_frequencies(plain))
    np.testing.assert_array_equal(inverse_frequencies(part, LayerKind(local=True)), inverse_frequencies(plain))
    np.testing.assert_array_equal(inverse_frequencies(part), inverse_frequencies(stretched))
    assert (attention_factor(part, LayerKind(local=True)), attention_factor(part)) == (
        1.0,
        attention_factor(stretched, LayerKind(local=True)),
    )


def test_an_entry_for_one_type_of_layer_is_its_own() -> None:
    rope = {"full_attention": PUBLISHED["olmo"], "sliding_attention": {"rope_type": "default"}}
    fields = HFConfig(SIZES | {"rope_parameters": rope}).rotary(96, layer_type="full_attention")
    assert fields["yarn_global_attn_only"]
    assert "yarn_global_attn_only" not in HFConfig(SIZES | {"rope_parameters": PUBLISHED["olmo"]}).rotary(96)
    untruncated = {"full_attention": PUBLISHED["gpt-oss"]}
    with pytest.raises(UnsupportedModelError, match="truncate=False"):
        HFConfig(SIZES | {"rope_parameters": untruncated}).rotary(96, layer_type="full_attention")


def test_dynamic_ntk_is_not_stretched(tmp_path: Path) -> None:
    make_hf_model("llama_dynamic", tmp_path)
    with pytest.raises(ConfigError, match=r"n_ctx=25 is longer than train_seq_length=24.*at most n_ctx=24"):
        HookedTransformer.from_pretrained_no_processing(tmp_path, n_ctx=25)
    assert HookedTransformer.from_pretrained_no_processing(tmp_path, n_ctx=8).cfg.n_ctx == 8


def test_phi_without_its_length_is_refused(hf_phi: tuple[Any, HookedTransformer], tmp_path: Path) -> None:
    source = Path(hf_phi[0].name_or_path)
    directory = rewrite(
        source, tmp_path, config=lambda c: {k: v for k, v in c.items() if k != "original_max_position_embeddings"}
    )
    with pytest.raises(CheckpointError, match="has no 'original_max_position_embeddings'"):
        HookedTransformer.from_pretrained_no_processing(directory)


@pytest.fixture(scope="module")
def hf_phi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, HookedTransformer]:
    directory = tmp_path_factory.mktemp("phi")
    theirs = make_hf_model("phi3_longrope", directory)
    theirs.name_or_path = str(directory)
    return theirs, HookedTransformer.from_pretrained_no_processing(directory, tokenizer=None)


@pytest.mark.parametrize("length", [1, 19, 20, 21, 24])
def test_short_and_long_texts_of_one_model(hf_phi: tuple[Any, HookedTransformer], length: int) -> None:
    theirs, ours = hf_phi
    assert hf_config("phi3_longrope").original_max_position_embeddings == 20
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS[:, :length])).logits.numpy()
    np.testing.assert_allclose(ours(TOKENS[:, :length]), expected, atol=5e-5, rtol=0)


def test_a_text_that_outgrows_the_short_factors(hf_phi: tuple[Any, HookedTransformer]) -> None:
    theirs, ours = hf_phi
    prompt = TOKENS[:, :17]
    with torch.no_grad():
        expected = theirs.generate(torch.tensor(prompt), max_new_tokens=7, do_sample=False, eos_token_id=None)
    with pytest.raises(InputError, match=r"Prompt 0 has 17 tokens.*Ask for at most 4, or pass use_past_kv_cache=False"):
        ours.generate(prompt, 7, **GREEDY)
    grown = ours.generate(prompt, 7, use_past_kv_cache=False, **GREEDY)
    np.testing.assert_array_equal(grown, expected.numpy())
    np.testing.assert_array_equal(ours.generate(prompt, 4, **GREEDY), grown[:, :21])


def test_the_switch_changes_something(longrope: HookedTransformer) -> None:
    """Otherwise the tests of which side a text is on could not fail."""
    never = longrope.replace(cfg=longrope.cfg.replace(longrope_original_max_position_embeddings=24))
    tokens = TOKENS[:, : SWITCH + 1]
    assert np.abs(np.asarray(never(tokens)) - np.asarray(longrope(tokens))).max() > 1e-2
    np.testing.assert_array_equal(never(tokens[:, :SWITCH]), longrope(tokens[:, :SWITCH]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", ["batch", "mask", "residual", "jit"])
def test_each_text_goes_by_its_own_length(longrope: HookedTransformer, side: str, way: str) -> None:
    lengths = [SWITCH - 2, SWITCH, SWITCH + 1, SWITCH + 3]
    rows = [TOKENS[0, :length].tolist() for length in lengths]
    batch = Batch.from_rows(rows, side)  # pyright: ignore[reportArgumentType]
    run: dict[str, Callable[[], jax.Array]] = {
        "batch": lambda: longrope(batch),
        "mask": lambda: longrope(batch.tokens, attention_mask=batch.mask),
        "residual": lambda: longrope(longrope.W_E[batch.tokens], start_at_layer=0, attention_mask=batch.mask),
        "jit": lambda: jax.jit(lambda model, batch: model(batch))(longrope, batch),
    }
    together = run[way]()
    for row, length in enumerate(lengths):
        own = together[row][np.asarray(batch.mask[row])]
        np.testing.assert_allclose(own, longrope(TOKENS[:1, :length])[0], atol=1e-5)


def test_one_program_for_short_and_long_texts(longrope: HookedTransformer) -> None:
    run = jax.jit(lambda model, batch: model(batch))
    for length in (2, SWITCH, SWITCH + 1, 12):
        mask = np.arange(12)[None] < length
        logits = run(longrope, Batch.from_mask(TOKENS[:1, :12], mask, "right"))[0, :length]
        np.testing.assert_allclose(logits, longrope(TOKENS[:1, :length])[0], atol=1e-5)
    assert run._cache_size() == 1


def test_texts_padded_on_the_right(tiny: HookedTransformer) -> None:
    cfg = HookedTransformerConfig(**(LONGROPE | {"d_vocab": -1}))
    model = HookedTransformer(cfg.replace(seed=0), tokenizer=tiny.tokenizer, default_padding_side="right")
    texts = ["John", "When John and Mary went to the store, John gave"]
    short, long = (model.to_tokens(text).shape[1] for text in texts)
    assert short <= SWITCH < long
    logits = model(texts)
    np.testing.assert_allclose(logits[0, :short], model(texts[0])[0], atol=1e-5)
    np.testing.assert_allclose(logits[1], model(texts[1])[0], atol=1e-5)


@pytest.mark.parametrize("length", [2, SWITCH + 1])
def test_cached_equals_uncached_on_either_side(longrope: HookedTransformer, length: int) -> None:
    prompt, n_new = TOKENS[:, :length], SWITCH - 1
    cached, uncached = (longrope.generate(prompt, n_new, use_past_kv_cache=use, **GREEDY, output_logits=True)
                        for use in (True, False))  # fmt: skip
    np.testing.assert_array_equal(cached.sequences, uncached.sequences)
    np.testing.assert_allclose(jnp.stack(cached.logits), jnp.stack(uncached.logits), atol=1e-4)


def test_generated_texts_of_a_padded_batch(longrope: HookedTransformer) -> None:
    prompts = [TOKENS[1, :9].tolist(), TOKENS[0, :2].tolist()]
    with pytest.raises(InputError, match=r"Prompt 1 has 2 tokens.*at most 5, or"):
        longrope.generate(prompts, 6, **GREEDY)
    together = longrope.generate(prompts, 5, **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = longrope.generate([prompt], 5, **GREEDY)
        np.testing.assert_array_equal(together[row, -5:], alone[0, -5:])


def test_a_sweep_over_short_and_long_prompts(longrope: HookedTransformer) -> None:
    lengths = (4, 9)
    clean, corrupted = ([TOKENS[row, : lengths[row]].tolist() for row in range(2)] for _ in range(2))
    for row in corrupted:
        row[1] = 1
    batches = (Batch.from_rows(rows, "left") for rows in (corrupted, clean))
    together = sweep(longrope, *batches, LogitDiff(3, 4), "resid_mid", ("pos",), reduce="none").values
    for row, length in enumerate(lengths):
        prompts = (jnp.asarray([rows[row]], jnp.int32) for rows in (corrupted, clean))
        alone = sweep(longrope, *prompts, LogitDiff(3, 4), "resid_mid", ("pos",), reduce="none").values[..., 0]
        assert np.ptp(np.asarray(alone)) > 1e-3
        np.testing.assert_allclose(together[:, :length, row], alone, atol=1e-5)  # positions count in the text
