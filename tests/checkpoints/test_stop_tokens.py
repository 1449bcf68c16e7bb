"""Stop tokens of a checkpoint: read from either file, kept, used where transformers stops, and exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch  # conftest.py skips this directory without it
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tljax import HookedTransformer
from tljax.errors import CheckpointError, ConfigError

PROMPTS = np.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.int64)
N_NEW = 10
Write = Callable[..., Path]


@pytest.fixture(params=["gpt2", "llama_mha"])
def write(request: pytest.FixtureRequest, hf_checkpoint: Callable[[str], Path], tmp_path: Path) -> Write:
    """Copies a tiny checkpoint, with other special tokens in its files (``None``: no generation_config.json)."""

    def copy(config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
        directory = tmp_path / f"copy{len(list(tmp_path.iterdir()))}" / "model"  # one name: programs are shared
        shutil.copytree(hf_checkpoint(request.param), directory)
        attributes = json.loads((directory / "config.json").read_text())
        for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
            attributes.pop(key, None)
        (directory / "config.json").write_text(json.dumps(attributes | config))
        (directory / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (directory / "generation_config.json").write_text(json.dumps(generation))
        return directory

    return copy


def theirs(directory: Path) -> np.ndarray:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory)
    prompts = torch.from_numpy(PROMPTS)
    options: Any = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": N_NEW, "do_sample": False}
    return model.generate(prompts, **options).numpy()


def ours(model: HookedTransformer, **options: Any) -> np.ndarray:
    return np.asarray(model.generate(PROMPTS, N_NEW, do_sample=False, verbose=False, **options))


def word_level(d_vocab: int, eos: int) -> Any:
    backend = Tokenizer(models.WordLevel({f"w{n}": n for n in range(d_vocab)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"w{eos}")


def test_generation_stops_where_transformers_stops(write: Write) -> None:
    free = theirs(write({}))[:, 3:]
    outside, first, later = 10**6, int(free[0, 1]), int(free[1, 4])
    unused = next(n for n in range(20) if n not in free)
    for config, generation in (
        ({"eos_token_id": [first, later], "pad_token_id": unused}, None),
        ({"eos_token_id": unused}, {"eos_token_id": [later, outside], "pad_token_id": unused, "temperature": 0.1}),
        ({"eos_token_id": first}, {"eos_token_id": first}),
        ({}, {"eos_token_id": [first, later], "_from_model_config": True}),
        ({}, {"eos_token_id": outside}),
    ):
        directory = write(config, generation)
        model = HookedTransformer.from_pretrained_no_processing(directory)
        expected = theirs(directory)
        np.testing.assert_array_equal(ours(model), expected)
        if generation != {"eos_token_id": outside}:
            with_text = model.set_tokenizer(word_level(model.cfg.d_vocab, unused))
            np.testing.assert_array_equal(ours(with_text), expected)
            model.save_pretrained(directory / "native")
            again = HookedTransformer.from_pretrained_no_processing(directory / "native")
            assert again.cfg.replace(model_name=model.cfg.model_name) == model.cfg


def test_the_call_and_the_tokenizer(write: Write) -> None:
    free = theirs(write({}))[:, 3:]
    first, later = int(free[0, 1]), int(free[1, 4])
    model = HookedTransformer.from_pretrained_no_processing(write({"eos_token_id": first}))
    declared, by_call = ours(model), ours(model, eos_token_id=later)
    assert (declared[0] == first).any()
    np.testing.assert_array_equal(by_call, ours(model.replace(cfg=model.cfg.replace(eos_token_ids=later))))
    silent = HookedTransformer.from_pretrained_no_processing(write({"eos_token_id": first}, {"top_k": 3}))
    assert silent.cfg.eos_token_ids is None  # a generation_config.json is asked alone, as in transformers
    np.testing.assert_array_equal(ours(silent.set_tokenizer(word_level(silent.cfg.d_vocab, later))), by_call)
    pieces = list(model.generate_stream(PROMPTS, N_NEW, max_tokens_per_yield=4, do_sample=False))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), declared)
    answer, cache = model.generate_with_cache(PROMPTS, N_NEW, do_sample=False, verbose=False, names_filter="hook_embed")
    np.testing.assert_array_equal(answer, declared)
    assert not np.asarray(cache.token_mask)[0, 5:].any()


def test_export(write: Write, tmp_path: Path) -> None:
    model = HookedTransformer.from_pretrained_no_processing(
        write({}, {"eos_token_id": [3, 5], "pad_token_id": 2, "bos_token_id": 1, "do_sample": True})
    )
    model.save_hf(tmp_path / "out")
    read = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (read.eos_token_id, read.pad_token_id, read.bos_token_id, read.do_sample) == ([3, 5], 2, 1, None)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ([3, 5], 2, 1)
    np.testing.assert_array_equal(ours(model), theirs(tmp_path / "out"))
    silent = HookedTransformer.from_pretrained_no_processing(write({}))
    silent.set_tokenizer(word_level(silent.cfg.d_vocab, 7)).save_hf(tmp_path / "by_tokenizer")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "by_tokenizer").eos_token_id == 7


def test_a_damaged_generation_config(write: Write) -> None:
    for content, message in (
        ({"eos_token_id": "</s>"}, r"generation_config.json has eos_token_id='</s>'; expected a token id"),
        ({"pad_token_id": 1.5}, r"generation_config.json has pad_token_id=1.5"),
        ({"eos_token_id": [1, True]}, r"eos_token_id=\[1, True\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            HookedTransformer.from_pretrained(write({}, content))
    directory = write({}, {})
    (directory / "generation_config.json").write_text('{"eos_token_id": ')
    with pytest.raises(CheckpointError, match=r"generation_config.json is not valid JSON"):
        HookedTransformer.from_pretrained(directory)
    with pytest.raises(ConfigError, match=r"eos_token_ids=\('x',\) must be a token id"):
        HookedTransformer.from_pretrained(write({})).cfg.replace(eos_token_ids="x")


def test_the_text_model_of_a_larger_one_declares_its_own() -> None:
    from tljax.checkpoints.stop_tokens import declared_tokens

    nested = {"text_config": {"eos_token_id": [1, 106], "pad_token_id": 0}, "pad_token_id": 3, "eos_token_id": None}
    assert declared_tokens(nested, "config.json") == {"eos_token_ids": (1, 106), "pad_token_id": 3}
