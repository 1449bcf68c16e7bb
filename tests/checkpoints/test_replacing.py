"""A checkpoint saved over another, killed at any file operation: the old one, the new one, or an error; no mixture."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tljax import HookedTransformer, HookedTransformerConfig
from tljax.checkpoints.formats import export, native
from tljax.errors import CheckpointError

SHAPE = {"d_model": 8, "n_heads": 2, "n_layers": 1, "n_ctx": 6, "d_mlp": 10, "normalization_type": "LN"}


class Killed(BaseException):
    """As if the process ended here."""


@pytest.fixture(scope="module")
def old(tiny: HookedTransformer) -> HookedTransformer:
    """Has a tokenizer."""
    return HookedTransformer(HookedTransformerConfig(**SHAPE, act_fn="gelu_new", d_vocab=969), tiny.tokenizer)


@pytest.fixture(scope="module")
def new() -> HookedTransformer:
    """Has the same shapes, other numbers, another activation and no tokenizer."""
    return HookedTransformer(HookedTransformerConfig(**SHAPE, act_fn="gelu", seed=1, d_vocab=969))


def read(directory: Path) -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing(directory)


def is_same(one: HookedTransformer, two: HookedTransformer) -> bool:
    leaves = zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True)
    return (
        all(np.array_equal(a, b) for a, b in leaves)
        and one.cfg.act_fn == two.cfg.act_fn
        and (one.tokenizer is None) == (two.tokenizer is None)
    )


def kill_at(number: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Ends the process at the n-th change of a name on disk; afterwards nothing is cleaned up either."""
    done: list[str] = []

    def counted(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if len(done) >= number:
                raise Killed
            done.append(name)
            return change(*arguments, **options)

        return run

    patch.setattr(os, "replace", counted("replace", os.replace))
    patch.setattr(Path, "unlink", counted("unlink", Path.unlink))
    patch.setattr(os, "unlink", counted("unlink", os.unlink))
    patch.setattr(shutil, "rmtree", counted("rmtree", shutil.rmtree))
    return done


@pytest.mark.parametrize(("save", "forth"), [("save_pretrained", True), ("save_pretrained", False), ("save_hf", True)])
def test_killed_at_any_moment(
    save: str, forth: bool, old: HookedTransformer, new: HookedTransformer, tmp_path: Path
) -> None:
    first, second = (old, new) if forth else (new, old)
    getattr(first, save)(tmp_path / "before")
    (tmp_path / "before" / "notes.txt").write_text("mine")
    outcomes: list[str] = []
    for number in range(100):
        directory = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "before", directory)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            done = kill_at(number, patch)
            getattr(second, save)(directory)
        outcomes.append(outcome(directory, first, second))
        assert (directory / "notes.txt").read_text() == "mine"
        if outcomes[-1] == "refused" and "refused" not in outcomes[:-1]:
            getattr(second, save)(directory)  # the next save mends all
            assert outcome(directory, first, second) == "new"
            assert not list(directory.glob(".*"))
        if len(done) < number:
            break
    assert sorted(outcomes, key=["old", "refused", "new"].index) == outcomes
    assert (outcomes[0], outcomes[-1], outcomes.count("refused") > 1) == ("old", "new", True)


def outcome(directory: Path, first: HookedTransformer, second: HookedTransformer) -> str:
    """What a directory loads as; a mixture fails."""
    try:
        loaded = read(directory)
    except CheckpointError as error:
        assert "has no config.json" in str(error)  # noqa: PT017
        return "refused"
    if is_same(loaded, second):
        return "new"
    assert is_same(loaded, first)
    return "old"


def test_a_killed_process(old: HookedTransformer, tmp_path: Path) -> None:
    old.save_pretrained(tmp_path)
    script = f"""
import os, signal
from pathlib import Path
from tljax.checkpoints.files import replacing
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with replacing.replace_checkpoint({str(tmp_path)!r}) as written:
    (written / "config.json").write_text("new")
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match=r"has no config.json.*A save into it was cut off: save again"):
        read(tmp_path)
    old.save_pretrained(tmp_path)
    assert is_same(read(tmp_path), old)


def test_what_belonged_to_another_checkpoint_goes_and_other_files_stay(new: HookedTransformer, tmp_path: Path) -> None:
    theirs = ("model.safetensors.index.json", "tokenizer.json", "vocab.txt", "merges.txt", "generation_config.json")
    kept = ("README.md", "model-00001-of-00002.safetensors", "optimizer.pt")
    for name in (*theirs, *kept, "config.json"):
        (tmp_path / name).write_text("{}")
    new.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "config.json", "model.safetensors"])
    assert is_same(read(tmp_path), new)


def test_a_tokenizer_that_was_put_there_first_stays(
    old: HookedTransformer, new: HookedTransformer, tmp_path: Path
) -> None:
    old.tokenizer.save_pretrained(tmp_path)
    new.save_hf(tmp_path)
    assert read(tmp_path).tokenizer is not None


def test_an_adapter_is_not_mixed_in(new: HookedTransformer, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for save in (new.save_pretrained, new.save_hf):
        with pytest.raises(CheckpointError, match="holds an adapter"):
            save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_config_and_weights_of_two_saves(old: HookedTransformer, new: HookedTransformer, tmp_path: Path) -> None:
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "old")
    with pytest.raises(CheckpointError, match="are of two different saves"):
        read(tmp_path / "old")


def test_transformers_loads_what_is_saved_over(new: HookedTransformer, old: HookedTransformer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    old.save_hf(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).vocab_size == old.tokenizer.vocab_size
    new.save_hf(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = np.asarray([[1, 2, 3]])
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(new(tokens), logits, atol=2e-5)


def test_errors_while_writing_leave_everything(
    old: HookedTransformer, new: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: Any) -> Any:
        raise OSError("disk full")

    for module in (native, export):
        monkeypatch.setattr(module, "write_side_files", fail)
    for save in (new.save_pretrained, new.save_hf):
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
