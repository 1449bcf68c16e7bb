"""Names, revisions, tokens and downloads, against a local server that speaks the hub's API."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import shard
from hub_server import Hub, serve

from tljax.checkpoints import load_checkpoint
from tljax.checkpoints.files.names import ALIASES, checkpoint_labels, checkpoint_revision, hub_id
from tljax.errors import CheckpointError, InputError

RAW = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture
def hub(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub with ``team/tiny``; the environment points at it."""
    files = files_of(gpt2) | {"README.md": b"no", "pytorch_model.bin": b"no", "tokenizer.json": b"{}"}
    with serve(Hub(repos={"team/tiny": {"main": files}}), monkeypatch) as running:
        yield running


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    """``load_checkpoint`` with a cache of its own."""
    return lambda name, **options: load_checkpoint(name, cache_dir=tmp_path / "cache", **RAW, **options)


def test_a_hub_id_is_downloaded_once_and_only_what_is_needed(hub: Hub, load: Callable[..., Any], gpt2: Path) -> None:
    loaded = load("team/tiny")
    assert (loaded.cfg.model_name, loaded.cfg.tokenizer_name) == ("tiny", "team/tiny")
    np.testing.assert_array_equal(loaded.params["embed"]["W_E"], load_checkpoint(gpt2, **RAW).params["embed"]["W_E"])
    assert sorted(file.name for file in loaded.tokenizer_source.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    fetched = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    load("team/tiny")
    assert [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path] == fetched


def test_revisions(hub: Hub, load: Callable[..., Any], hf_checkpoint: Callable[[str], Path]) -> None:
    hub.repos["team/tiny"]["v2"] = files_of(hf_checkpoint("llama_mha"))
    assert load("team/tiny", revision="v2").cfg.original_architecture == "LlamaForCausalLM"
    assert load("team/tiny").cfg.original_architecture == "GPT2LMHeadModel"
    with pytest.raises(CheckpointError, match=r"team/tiny has no revision 'v3'"):
        load("team/tiny", revision="v3")


def test_training_checkpoints_are_revisions(
    hub: Hub, load: Callable[..., Any], hf_checkpoint: Callable[[str], Path]
) -> None:
    hub.repos["EleutherAI/pythia-70m"] = {"step512": files_of(hf_checkpoint("neox"))}
    assert load("pythia-70m", checkpoint_value=512).cfg.model_name == "pythia-70m"
    assert load("Pythia", checkpoint_index=10).cfg.tokenizer_name is None  # step 512; no tokenizer in the repository
    with pytest.raises(InputError, match=r"no checkpoint at step 700: the nearest are \[512, 1000\]"):
        load("pythia-70m", checkpoint_value=700)
    with pytest.raises(InputError, match=r"one of revision, checkpoint_value and checkpoint_index"):
        load("pythia-70m", checkpoint_value=512, revision="main")
    with pytest.raises(InputError, match=r"knows no training checkpoints of team/tiny"):
        load("team/tiny", checkpoint_index=0)


def test_tokens_are_sent_and_gated_models_explained(
    hub: Hub, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("team/tiny")
    with pytest.raises(CheckpointError, match=r"team/tiny is gated: accept its licence"):
        load("team/tiny")
    load("team/tiny", token=hub.token)
    assert hub.requests[-1][2] == "Bearer hf_secret"
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    load("team/tiny")
    assert {authorization for _, _, authorization in hub.requests} == {"Bearer hf_secret"}


def test_sharded_download(hub: Hub, load: Callable[..., Any], gpt2: Path, tmp_path: Path) -> None:
    hub.repos["team/large"] = {"main": files_of(shard(gpt2, tmp_path / "sharded"))}
    np.testing.assert_array_equal(load("team/large").params["embed"]["W_E"], load("team/tiny").params["embed"]["W_E"])


def test_pickles_are_fetched_only_when_there_is_nothing_else(
    hub: Hub, load: Callable[..., Any], gpt2: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(gpt2 / "model.safetensors"), tmp_path / "pytorch_model.bin")
    config = (gpt2 / "config.json").read_bytes()
    hub.repos["team/old"] = {
        "main": {"config.json": config, "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    }
    np.testing.assert_array_equal(load("team/old").params["embed"]["W_E"], load("team/tiny").params["embed"]["W_E"])


def test_unknown_repositories_and_names(hub: Hub, load: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match=r"team/nothing is not on the hub, or it is private.*HF_TOKEN"):
        load("team/nothing")
    with pytest.raises(CheckpointError, match=r"'gpt2-smal' is neither.*Did you mean 'gpt2-small'"):
        load("gpt2-smal")


def test_offline_uses_the_cache(hub: Hub, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    load("team/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    load("team/tiny")
    assert not hub.requests
    with pytest.raises(CheckpointError, match=r"team/other is not .*in the local cache.*unset HF_HUB_OFFLINE"):
        load("team/other")


@pytest.mark.filterwarnings("ignore")  # the client reports the broken transfer itself
def test_an_interrupted_download_loads_nothing_and_can_be_continued(
    hub: Hub, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its retries
    hub.cut.add("model.safetensors")
    with pytest.raises(CheckpointError, match=r"Downloading team/tiny failed: .*try again to continue"):
        load("team/tiny")
    hub.cut.clear()
    assert load("team/tiny").cfg.n_layers == 3


def test_aliases() -> None:
    assert hub_id("GPT2-small") == hub_id("openai-community/GPT2") == "openai-community/gpt2"
    assert hub_id("pythia-125m-deduped-v0") == "EleutherAI/pythia-160m-deduped-v0"
    assert hub_id("eleutherai/pythia-19m") == "EleutherAI/pythia-70m"
    assert hub_id("llama-3-8b") == "meta-llama/Meta-Llama-3-8B"
    assert hub_id("stanford-gpt2-medium-c") == "stanford-crfm/celebrimbor-gpt2-medium-x81"
    assert hub_id("NousResearch/Some-Llama") == "NousResearch/Some-Llama"
    assert all(alias == alias.lower() and repo.count("/") == 1 for alias, repo in ALIASES.items())
    assert len({repo for repo in ALIASES.values() if "pythia" in repo}) == 37
    for wrong in ("a/b/c", "/a", "a/", "", "nothing-like-it"):
        with pytest.raises(CheckpointError, match=r"neither a directory, nor a known model name"):
            hub_id(wrong)


def test_published_checkpoints() -> None:
    assert len(checkpoint_labels("EleutherAI/pythia-70m")[0]) == 154
    assert checkpoint_labels("EleutherAI/pythia-70m-v0")[0][0] == 1000
    steps, prefix = checkpoint_labels("stanford-crfm/alias-gpt2-small-x21")
    assert (len(steps), steps[:2], steps[-1], prefix) == (609, (0, 10), 400000, "checkpoint-")
    assert checkpoint_revision("EleutherAI/pythia-70m", None, -1) == "step143000"
    with pytest.raises(InputError, match=r"checkpoint_index=999 is out of range"):
        checkpoint_revision("EleutherAI/pythia-70m", None, 999)
