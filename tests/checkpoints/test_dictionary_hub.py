"""Dictionaries by release, hub id and directory: the hub is a local server that speaks its API."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_server import Hub, serve
from safetensors.numpy import save

import tljax
from tljax import HookedTransformer, HookedTransformerConfig
from tljax.dictionaries import (
    Crosscoder,
    CrosscoderConfig,
    CrossLayerConfig,
    CrossLayerTranscoder,
    Dictionary,
    UnscaledDictionaryWarning,
    releases,
    sae_ids,
)
from tljax.dictionaries.formats.releases import RELEASES, find_release
from tljax.dictionaries.formats.table import FORMATS
from tljax.errors import CheckpointError, DictionaryError

D, F = 16, 32
JB = "jbloom/GPT2-Small-SAEs-Reformatted"
SITE = "blocks.8.hook_resid_pre"


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "scaling_factor": (F,)}
    arrays = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"scaling_factor": np.ones(F, np.float32)}


def published(site: str, seed: int = 0, **changes: Any) -> dict[str, bytes]:
    """A folder as the release gpt2-small-res-jb has it: a flat config of version 2, ones as scaling factors."""
    cfg = {
        "model_name": "gpt2-small", "hook_point": site, "hook_point_layer": 8, "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext", "is_dataset_tokenized": False, "context_size": 128, "d_in": D,
        "d_sae": F, "b_dec_init_method": "geometric_median", "dtype": "torch.float32", "device": "mps", "seed": 42,
        "l1_coefficient": 8e-05, "lr": 0.0004, "use_ghost_grads": False, "expansion_factor": 32,
    }  # fmt: skip
    return {
        f"{site}/cfg.json": json.dumps(cfg | changes).encode(),
        f"{site}/sae_weights.safetensors": save(weights(seed)),
        f"{site}/sparsity.safetensors": save({"sparsity": np.full(F, -2.0, np.float32)}),
        f"{site}/trainer_state.pt": b"large",
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running hub with two dictionaries of the release, and one of nobody's; downloads go into ``tmp_path``."""
    files = published(SITE) | published("blocks.9.hook_resid_pre", 1) | {"README.md": b"no"}
    scaled = published("blocks.0.hook_mlp_out", normalize_activations=True)
    held = {
        JB: {"main": files, "v2": published(SITE, 2)},
        "someone/saes": {"main": scaled},
        "tommmcgrath/gpt2-small-mlp-out-saes": {
            "main": {
                name.replace(
                    "blocks.0.hook_mlp_out", find_release("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out").path
                ): data
                for name, data in scaled.items()
            }
        },
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(Hub(repos=held), monkeypatch) as running:
        yield running


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    cfg = HookedTransformerConfig(
        d_model=D, n_heads=2, n_layers=9, n_ctx=64, d_vocab=20, d_mlp=8, act_fn="gelu", seed=1, model_name="gpt2",
    )  # fmt: skip
    return HookedTransformer(cfg)


def test_the_seeds_code(hub: Hub, model: HookedTransformer, tmp_path: Path) -> None:
    from tljax import SAE

    sae = SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre", cache_dir=tmp_path)
    tokens = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
    _, cache = model.run_with_cache(tokens)
    sae_acts = sae.encode(cache["resid_pre", 8])
    w, x = weights(), np.asarray(cache[SITE], np.float64)
    right = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    np.testing.assert_allclose(sae_acts, right, atol=1e-5 * right.max())
    acts = cache["resid_pre", 8].reshape(-1, D)
    x_hat, z = sae(acts)
    np.testing.assert_allclose(z, right.reshape(-1, F), atol=1e-5 * right.max())
    np.testing.assert_allclose(x_hat, right.reshape(-1, F) @ w["W_dec"] + w["b_dec"], atol=2e-4)
    assert sae.cfg.tap.reads == SITE
    assert sae.cfg.tap.processing == ("center_writing_weights",)
    assert dict(sae.cfg.metadata)["l0"] == "60.0"
    assert sae.sparsity is not None
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert fetched == {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    assert not any("blocks.9" in path for _, path, _ in hub.requests)


def test_a_hub_id_and_a_folder_in_it(hub: Hub, tmp_path: Path) -> None:
    by_name = Dictionary.from_pretrained(JB, "blocks.9.hook_resid_pre", cache_dir=tmp_path)
    np.testing.assert_array_equal(by_name.W_enc, weights(1)["W_enc"])
    assert not any("trainer_state" in path for method, path, _ in hub.requests if method == "GET")
    other = Dictionary.from_pretrained("gpt2-small-res-jb", SITE, revision="v2", cache_dir=tmp_path)
    np.testing.assert_array_equal(other.W_enc, weights(2)["W_enc"])
    with pytest.raises(
        CheckpointError, match=r"has no blocks.8.hook_resid_poost.*Did you mean 'blocks.8.hook_resid_pre'"
    ):
        Dictionary.from_pretrained(JB, "blocks.8.hook_resid_poost", cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"not on the hub.*no directory nobody/saes"):
        Dictionary.from_pretrained("nobody/saes", SITE, cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match="has no revision 'v3'"):
        Dictionary.from_pretrained(JB, SITE, revision="v3", cache_dir=tmp_path)


def test_a_scale_that_the_release_states_is_folded(hub: Hub, tmp_path: Path) -> None:
    sae = Dictionary.from_pretrained("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out", cache_dir=tmp_path)
    assert sae.cfg.normalize_activations == "none"
    scale, x = 1.049317316132615, np.random.default_rng(1).normal(size=(3, D))
    w = weights()
    right = np.maximum((scale * x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    np.testing.assert_allclose(sae.encode(jnp.asarray(x, jnp.float32)), right, atol=1e-4)
    np.testing.assert_allclose(
        sae(jnp.asarray(x, jnp.float32))[0], (right @ w["W_dec"] + w["b_dec"]) / scale, atol=1e-4
    )
    with pytest.warns(UnscaledDictionaryWarning, match="norm_scaling_factor="):
        Dictionary.from_pretrained("someone/saes", "blocks.0.hook_mlp_out", cache_dir=tmp_path)
    given = Dictionary.from_pretrained(
        "someone/saes", "blocks.0.hook_mlp_out", norm_scaling_factor=scale, cache_dir=tmp_path
    )
    np.testing.assert_allclose(given.W_enc, sae.W_enc)


def test_a_release_of_another_format(hub: Hub, tmp_path: Path) -> None:
    w = {name: array for name, array in weights().items() if name != "scaling_factor"} | {"threshold": np.ones(F, "f4")}
    content = io.BytesIO()
    np.savez(content, **w)
    path = "layer_12/width_16k/average_l0_82"
    hub.repos["google/gemma-scope-2b-pt-res"] = {
        "main": {f"{path}/params.npz": content.getvalue(), "layer_12/width_16k/average_l0_22/params.npz": b"no"}
    }
    sae = Dictionary.from_pretrained(
        "gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical", cache_dir=tmp_path
    )
    assert (sae.cfg.architecture, sae.cfg.tap.reads) == ("jumprelu", "blocks.12.hook_resid_post")
    assert (sae.cfg.tap.model_name, sae.cfg.tap.processing) == ("gemma-2-2b", ())
    assert dict(sae.cfg.metadata)["l0"] == "82.0"
    np.testing.assert_array_equal(sae.W_enc, w["W_enc"])
    assert not any("l0_22" in path for _, path, _ in hub.requests)
    sae.save(tmp_path / "as SAELens has it")
    again = Dictionary.load(tmp_path / "as SAELens has it")
    assert again.cfg == sae.cfg.replace(metadata=again.cfg.metadata, d_out=None)


def test_crosscoders_and_cross_layer_transcoders(hub: Hub, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    shapes = {"W_enc": (2, D, F), "b_enc": (F,), "W_dec": (F, 2, D), "b_dec": (2, D)}
    params = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    crosscoder = Crosscoder(params, CrosscoderConfig(n_sources=2, d_in=D, d_sae=F))
    shapes = {"W_enc": (D, F), "b_enc": (F,), "b_dec": (D,)}
    layers = [
        {
            name: draw.normal(size=shape).astype(np.float32)
            for name, shape in (shapes | {"W_dec": (F, 2 - n, D)}).items()
        }
        for n in range(2)
    ]
    transcoder = CrossLayerTranscoder(layers, CrossLayerConfig(n_layers=2, d_in=D, d_sae=F))
    for one in (crosscoder, transcoder):
        folder = tmp_path / type(one).__name__
        one.save(folder)
        files = {f"{folder.name}/{file.name}": file.read_bytes() for file in folder.iterdir()}
        hub.repos[f"someone/{folder.name}"] = {"main": files}
        for given, name in ((folder, None), (f"someone/{folder.name}", folder.name)):
            again = type(one).from_pretrained(given, name, cache_dir=tmp_path / "cache")
            assert again.cfg == one.cfg
            assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(one)))
        with pytest.raises(DictionaryError, match=f"not a dictionary: tljax.dictionaries.{folder.name} loads it"):
            Dictionary.from_pretrained(folder)


def test_a_directory_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers
    for name, content in published(SITE).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for given, sae_id in (
        (tmp_path, SITE),
        (str(tmp_path), SITE),
        (tmp_path / SITE, None),
        (f"{tmp_path}/{SITE}/", None),
    ):
        sae = Dictionary.from_pretrained(given, sae_id)
        np.testing.assert_array_equal(sae.W_enc, weights()["W_enc"])
        assert sae.cfg.tap.processing is None
    for given in (tmp_path / "blocks.7", f"{tmp_path}/x/y", "./blocks.8", "a/b/c"):
        with pytest.raises(DictionaryError, match=r"no directory .*Nothing was looked up"):
            Dictionary.from_pretrained(given)


def test_without_the_network_what_was_downloaded_is_read(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"cache_dir": tmp_path}
    first = Dictionary.from_pretrained("gpt2-small-res-jb", SITE, **options)
    asked = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = Dictionary.from_pretrained("gpt2-small-res-jb", SITE, **options)
    np.testing.assert_array_equal(again.W_enc, first.W_enc)
    assert len(hub.requests) == asked


def test_the_table_of_releases_is_whole() -> None:
    names = {row.name for row in FORMATS}
    assert {entry["format"] for entry in RELEASES.values()} <= names
    assert len(releases()) > 150
    assert len(sae_ids("gpt2-small-res-jb")) == 13
    for name in releases():
        ids = sae_ids(name)
        assert len(set(ids)) == len(ids)
        for one in (ids[0], ids[-1]):
            release = find_release(name, one)
            assert release.path
            assert "{" not in release.path
    canonical = find_release("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
    assert (canonical.path, canonical.l0) == ("layer_12/width_16k/average_l0_82", 82)
    assert canonical.facts["reads"] == "blocks.12.hook_resid_post"


def test_sae_is_imported_when_it_is_used() -> None:
    assert tljax.SAE is Dictionary
