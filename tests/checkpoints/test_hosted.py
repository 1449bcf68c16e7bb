"""TransformerLens's hosted toys by name: tiny files of their layouts, on a local server that speaks the hub's API."""

import functools
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Hub, serve
from safetensors import safe_open

from tljax import HookedTransformer
from tljax.checkpoints import load_checkpoint
from tljax.checkpoints.files import reader
from tljax.checkpoints.files.hub import MODELS
from tljax.checkpoints.layout import flatten
from tljax.errors import CheckpointError, InputError, UnsupportedModelError

torch = pytest.importorskip("torch")
GOLDEN = Path(__file__).parents[1] / "golden" / "state_dicts_transformerlens.safetensors"
State = dict[str, np.ndarray]
RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
TOKENIZER = "NeelNanda/gpt-neox-tokenizer-digits"
TRAINING = {"lr_hidden": 2e-3, "batches_per_step": 1, "dataset_name": "c4_code", "ln_eps": 1e-5, "version": 23}
"""Some of what the published files say besides."""


@functools.cache
def golden(case: str) -> tuple[State, dict[str, Any]]:
    start = f"{case}/state/"
    with safe_open(GOLDEN, framework="numpy") as file:
        state = {key.removeprefix(start): file.get_tensor(key) for key in file.keys() if key.startswith(start)}  # noqa: SIM118
        return state, json.loads(file.metadata()["record"])["cfg"][case]


def logits(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and TransformerLens's logits."""
    with safe_open(GOLDEN, framework="numpy") as file:
        return file.get_tensor("tokens").astype(np.int32), file.get_tensor(f"{case}/logits")


def config(cfg: dict[str, Any], **more: Any) -> bytes:
    """A config.json with the keys of the published ones."""
    names = ("d_model", "n_layers", "d_mlp", "d_head", "n_heads", "n_ctx", "d_vocab", "act_fn", "attn_only")
    return json.dumps({name: cfg[name] for name in names} | {"normalization": "LN"} | TRAINING | more).encode()


def pickled(state: State) -> bytes:
    stream = io.BytesIO()
    torch.save({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in state.items()}, stream)
    return stream.getvalue()


def old(state: State, turned: Callable[[str], bool]) -> State:
    """A state dict as the SoLU models trained on the Pile have it: norms of other names, some tensors turned."""
    named = {
        key.replace("ln_final", "norm").replace("ln1", "norm1").replace("ln2", "norm2"): v for key, v in state.items()
    }
    return {key: value.swapaxes(-2, -1) if turned(key) else value for key, value in named.items()}


def mingpt(state: State) -> State:
    """A state dict under minGPT's names."""
    renamed = {"tok_emb.weight": state["embed.W_E"], "pos_emb": state["pos_embed.W_pos"][None]}
    for layer in range(2):
        block = f"blocks.{layer}"
        attn, mlp = f"{block}.attn", f"{block}.mlp"
        for letter, name in (("Q", "query"), ("K", "key"), ("V", "value")):
            renamed[f"{attn}.{name}.weight"] = state[f"{attn}.W_{letter}"].transpose(0, 2, 1).reshape(-1, 8)
            renamed[f"{attn}.{name}.bias"] = state[f"{attn}.b_{letter}"].reshape(-1)
        renamed[f"{attn}.proj.weight"] = state[f"{attn}.W_O"].reshape(-1, 8).T
        renamed[f"{attn}.proj.bias"] = state[f"{attn}.b_O"]
        renamed[f"{attn}.mask"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
        for number, name in ((0, "in"), (2, "out")):
            renamed[f"{mlp}.{number}.weight"] = state[f"{mlp}.W_{name}"].T
            renamed[f"{mlp}.{number}.bias"] = state[f"{mlp}.b_{name}"]
        for norm in ("ln1", "ln2"):
            renamed |= {f"{block}.{norm}.{long}": state[f"{block}.{norm}.{long[0]}"] for long in ("weight", "bias")}
    renamed |= {"ln_f.weight": state["ln_final.w"], "ln_f.bias": state["ln_final.b"]}
    return renamed | {"head.weight": state["unembed.W_U"].T}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub without repositories; the environment points at it and at an empty cache."""
    with serve(Hub(), monkeypatch) as running:
        yield running


@pytest.fixture
def load(hub: Hub, tmp_path: Path) -> Callable[..., HookedTransformer]:
    return lambda name, **options: HookedTransformer.from_pretrained(
        name, cache_dir=tmp_path / "cache", **RAW, **options
    )


def put(hub: Hub, repo: str, case: str, state: State | None = None, **keys: Any) -> None:
    plain, cfg = golden(case)
    hub.repos[repo] = {"main": {"config.json": config(cfg, **keys), "model_final.pth": pickled(state or plain)}}


def assert_golden(model: HookedTransformer, case: str) -> None:
    tokens, expected = logits(case)
    np.testing.assert_allclose(model(tokens), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "repo", "case", "keys"),
    [
        ("attn-only-1l", "NeelNanda/Attn_Only_1L512W_C4_Code", "attn_only", {"shortformer_pos": False}),
        (
            "Attn-Only-2L-Demo", "NeelNanda/Attn-Only-2L512W-Shortformer-6B-big-lr", "shortformer_attn_only",
            {"shortformer_pos": True},
        ),
        ("redwood_attn_2l", "ArthurConmy/redwood_attn_2l", "shortformer_attn_only", {"shortformer_pos": True}),
        ("gelu-2l", "NeelNanda/GELU_2L512W_C4_Code", "ln", {}),
        ("solu-3l", "NeelNanda/SoLU_3L512W_C4_Code", "solu_ln_same", {}),
    ],
)  # fmt: skip
def test_names_lead_to_models(
    hub: Hub, load: Callable[..., HookedTransformer], name: str, repo: str, case: str, keys: dict[str, Any]
) -> None:
    if case == "solu_ln_same":  # the golden one has an output vocabulary of its own
        state, cfg = golden("solu_ln")
        whole = state | {
            "unembed.W_U": np.pad(state["unembed.W_U"], ((0, 0), (0, 3))),
            "unembed.b_U": np.pad(state["unembed.b_U"], (0, 3)),
        }
        hub.repos[repo] = {"main": {"config.json": config(cfg), "model_final.pth": pickled(whole)}}
        tokens, expected = logits("solu_ln")
        np.testing.assert_allclose(load(name)(tokens)[:, :, :21], expected, rtol=0, atol=5e-5)
        return
    put(hub, repo, case, **keys)
    model = load(name)
    assert_golden(model, case)
    assert model.cfg.model_name == repo.partition("/")[2]
    assert model.tokenizer is None


@pytest.mark.parametrize("n_layers", [2, 8, 10])
def test_the_old_layouts(hub: Hub, load: Callable[..., HookedTransformer], n_layers: int) -> None:
    state, cfg = golden("ln")
    deep = {key: value for key, value in state.items() if not key.startswith("blocks.")}
    for layer in range(n_layers):
        block = f"blocks.{layer % 2}."
        deep |= {f"blocks.{layer}.{k.removeprefix(block)}": v for k, v in state.items() if k.startswith(block)}

    def turned(key: str) -> bool:
        return n_layers <= 8 if key == "pos_embed.W_pos" else n_layers <= 6 and ".W_" in key

    repo = {2: "NeelNanda/SoLU_2L_v10_old", 8: "NeelNanda/SoLU_8L_v21_old", 10: "NeelNanda/SoLU_10L_v22_old"}[n_layers]
    files = {"config.json": config(cfg | {"n_layers": n_layers}), "model_final.pth": pickled(old(deep, turned))}
    hub.repos[repo] = {"main": files}
    params = flatten(load(f"solu-{n_layers}l-pile").params)
    expected = HookedTransformer.from_transformer_lens(deep, cfg | {"n_layers": n_layers})
    for path, leaf in flatten(expected.params).items():
        np.testing.assert_array_equal(params[path], leaf, err_msg=path)


def test_othello(hub: Hub, load: Callable[..., HookedTransformer]) -> None:
    state, _ = golden("ln")
    put(hub, "Baidicoot/Othello-GPT-Transformer-Lens", "ln", mingpt(state), architecture="mingpt")
    model = load("othello-gpt")
    plain = HookedTransformer.from_transformer_lens(state | {"unembed.b_U": np.zeros(24, np.float32)}, golden("ln")[1])
    for path, leaf in flatten(plain.params).items():
        np.testing.assert_array_equal(flatten(model.params)[path], leaf, err_msg=path)


def test_training_checkpoints_are_files(hub: Hub, load: Callable[..., HookedTransformer]) -> None:
    state, _ = golden("ln")
    repo = "NeelNanda/GELU_1L512W_C4_Code"
    put(hub, repo, "ln")
    later = state | {"embed.W_E": state["embed.W_E"] + 1}
    for step, tensors in ((900, state), (20_000, later), (1_500_000_000, state)):
        hub.repos[repo]["main"][f"checkpoints/GELU_1L_{step}.pth"] = pickled(tensors)
    np.testing.assert_array_equal(load("gelu-1l", checkpoint_value=20_000).W_E, later["embed.W_E"])
    np.testing.assert_array_equal(load("gelu-1l", checkpoint_index=1).W_E, later["embed.W_E"])
    np.testing.assert_array_equal(load("gelu-1l").W_E, state["embed.W_E"])
    with pytest.raises(InputError, match=r"no checkpoint at step 1000: the nearest are \[900, 20000\]"):
        load("gelu-1l", checkpoint_value=1000)
    with pytest.raises(InputError, match=r"checkpoint_index=3 is out of range: .* has 3 checkpoints"):
        load("gelu-1l", checkpoint_index=3)


def test_the_tokenizer_is_in_another_repository(hub: Hub, load: Callable[..., HookedTransformer]) -> None:
    repo = "NeelNanda/GELU_2L512W_C4_Code"
    put(hub, repo, "ln", tokenizer_name=TOKENIZER)
    with pytest.raises(CheckpointError, match=rf"names the tokenizer of {TOKENIZER}\. .*not on the hub.*tokenizer="):
        load("gelu-2l")
    hub.repos[TOKENIZER] = {"main": {"tokenizer.json": (MODELS / "tljax-tiny" / "tokenizer.json").read_bytes()}}
    model = load("gelu-2l")
    assert model.tokenizer is not None
    del hub.repos[TOKENIZER]
    hub.requests.clear()
    assert load("gelu-2l", tokenizer=model.tokenizer).tokenizer is not None
    assert not any(TOKENIZER in path for _, path, _ in hub.requests)


def test_a_directory_of_such_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, cfg = golden("ln")
    (tmp_path / "config.json").write_bytes(config(cfg, tokenizer_name=TOKENIZER))
    (tmp_path / "model_final.pth").write_bytes(pickled({k: v for k, v in state.items() if not k.endswith("b_K")}))
    loaded = load_checkpoint(tmp_path, **RAW)
    assert not np.any(loaded.params["blocks"][0]["attn"]["b_K"])  # as TransformerLens fills it in
    assert loaded.tokenizer_files() is None
    (tmp_path / "config.json").write_bytes(config(cfg, use_local_attn=True))
    with pytest.raises(UnsupportedModelError, match=r"use_local_attn=True"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(config(cfg | {"d_model": 9}))
    with pytest.raises(CheckpointError, match=r"embed\.W_E is \[24, 8\], config\.json says \[24, 9\]"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(config(cfg))
    (tmp_path / "other_final.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds model_final\.pth, other_final\.pth: keep the one"):
        load_checkpoint(tmp_path)
    (tmp_path / "other_final.pth").unlink()
    monkeypatch.setattr(reader, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match=r"model_final\.pth.*torch is not installed"):
        load_checkpoint(tmp_path)
