"""Short names of checkpoints on the hub, and the training checkpoints they were published with."""

import itertools
from collections.abc import Iterator, Sequence

from tljax.errors import CheckpointError, InputError, nearest

_REGULAR = (
    ("meta-llama/Llama-2-{}{}-hf", "7b 13b 70b", ("", "-chat")),
    ("meta-llama/Meta-Llama-3-{}{}", "8B 70B", ("", "-Instruct")),
    ("meta-llama/Llama-3.1-{}{}", "8B 70B", ("", "-Instruct")),
    ("meta-llama/Llama-3.2-{}{}", "1B 3B", ("", "-Instruct")),
    ("meta-llama/Llama-3.3-{}{}", "70B", ("-Instruct",)),
    ("codellama/CodeLlama-{}{}-hf", "7b", ("", "-Python", "-Instruct")),
    ("01-ai/Yi-{}{}", "6B 34B", ("", "-Chat")),
    ("Qwen/Qwen1.5-{}{}", "0.5B 1.8B 4B 7B 14B", ("", "-Chat")),
    ("Qwen/Qwen2-{}{}", "0.5B 1.5B 7B", ("", "-Instruct")),
    ("Qwen/Qwen2.5-{}{}", "0.5B 1.5B 3B 7B 14B 32B 72B", ("", "-Instruct")),
    ("Qwen/Qwen3-{}{}", "0.6B 1.7B 4B 8B 14B", ("",)),
    ("Qwen/Qwen3-{}{}", "0.6B", ("-Base",)),
    ("google/gemma-{}{}", "2b 7b", ("", "-it")),
    ("google/gemma-2-{}{}", "2b 9b 27b", ("", "-it")),
    ("google/gemma-3-{}{}", "270m", ("", "-it")),
    ("google/gemma-3-{}{}", "1b 4b 12b 27b", ("-pt", "-it")),
    ("roneneldan/TinyStories-{}{}", "1M 3M 8M 28M 33M 1Layer-21M 2Layers-33M", ("",)),
    ("roneneldan/TinyStories-Instruct-{}{}", "1M 3M 8M 28M 33M 2Layers-33M", ("",)),
    ("microsoft/phi-{}{}", "1 1_5 2 4", ("",)),
    ("bigscience/bloom-{}{}", "560m 1b1 1b7 3b 7b1", ("",)),
    ("allenai/OLMo-{}{}-hf", "1B 7B", ("",)),
    ("allenai/OLMo-2-{}{}", "0425-1B 1124-7B", ("",)),
    ("allenai/Olmo-3-{}{}", "1025-7B 1125-32B", ("",)),
    ("allenai/Olmo-3-{}{}", "7B 32B", ("-Think",)),
    ("allenai/Olmo-3-{}{}", "7B", ("-Instruct",)),
    ("allenai/Olmo-3.1-{}{}", "32B", ("-Instruct", "-Think")),
)
"""Hub ids by pattern, sizes and suffixes; :func:`_names` derives their short names."""

_OTHERS = {
    "openai-community/gpt2": "gpt2-small",
    "openai-community/gpt2-medium": "",
    "openai-community/gpt2-large": "",
    "openai-community/gpt2-xl": "",
    "distilbert/distilgpt2": "distillgpt2 distill-gpt2 distil-gpt2 gpt2-xs",
    "ai-forever/mGPT": "",
    "EleutherAI/gpt-neo-125M": "gpt-neo-small neo-small neo",
    "EleutherAI/gpt-neo-1.3B": "gpt-neo-medium neo-medium",
    "EleutherAI/gpt-neo-2.7B": "gpt-neo-large neo-large",
    "EleutherAI/gpt-j-6B": "gpt-j gptj",
    "EleutherAI/gpt-neox-20b": "gpt-neox neox",
    "bigcode/gpt_bigcode-santacoder": "santacoder bigcode/santacoder",  # the latter needs code of its own
    "facebook/opt-125m": "opt-small opt",
    "facebook/opt-1.3b": "opt-medium",
    "facebook/opt-2.7b": "opt-large",
    "facebook/opt-6.7b": "opt-xl",
    "facebook/opt-13b": "opt-xxl",
    "facebook/opt-30b": "opt-xxxl",
    "facebook/opt-66b": "opt-xxxxl",
    "stabilityai/stablelm-base-alpha-3b": "stablelm-base-3b",
    "stabilityai/stablelm-base-alpha-7b": "stablelm-base-7b",
    "stabilityai/stablelm-tuned-alpha-3b": "stablelm-tuned-3b",
    "stabilityai/stablelm-tuned-alpha-7b": "stablelm-tuned-7b",
    "meta-llama/Llama-2-70b-chat-hf": "meta-llama-2-70b-chat-hf",
    "codellama/CodeLlama-7b-hf": "codellamallama-2-7b",
    "Qwen/QwQ-32B-Preview": "qwen-32b-preview",
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral-7b-instruct",
    "mistralai/Mistral-Nemo-Base-2407": "",
    "mistralai/Mistral-Small-24B-Base-2501": "",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral mixtral-8x7b",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-instruct mixtral-8x7b-instruct",
    "allenai/OLMoE-1B-7B-0924": "olmoe",
    "openai/gpt-oss-20b": "gpt-oss",
    "openai/gpt-oss-120b": "",
    "microsoft/Phi-3-mini-4k-instruct": "phi-3",
    "allenai/OLMo-2-0425-1B": "olmo-2-1b",
    "allenai/OLMo-2-1124-7B": "olmo-2-7b",
    "google/gemma-3-1b-pt": "gemma-3-1b",  # without an ending, the pretrained model is meant
    "google/gemma-3-4b-pt": "gemma-3-4b",
    "google/gemma-3-12b-pt": "gemma-3-12b",
    "google/gemma-3-27b-pt": "gemma-3-27b",
    "swiss-ai/Apertus-8B-2509": "apertus-8b apertus",
    "swiss-ai/Apertus-8B-Instruct-2509": "apertus-8b-instruct apertus-instruct",
    "roneneldan/TinyStories-Instuct-1Layer-21M": "",  # the id lacks an r
}
"""Hub id → short names that :func:`_names` does not derive."""

_TOYS = {
    "Attn_Only_{}512W_C4_Code": ("1L 2L 3L 4L", "attn-only"),
    "GELU_{}512W_C4_Code": ("1L 2L 3L 4L", "gelu"),
    "SoLU_{}512W_C4_Code": ("1L 2L 3L 4L", "solu"),
    "SoLU_{}768W_C4_Code": ("6L", "solu"),
    "SoLU_{}1024W_C4_Code": ("8L", "solu"),
    "SoLU_{}1280W_C4_Code": ("10L", "solu"),
    "SoLU_{}1536W_C4_Code": ("12L", "solu"),
}
_TOYS_OF_OLD = {"1L": "v9", "2L": "v10", "4L": "v11", "6L": "v13", "8L": "v21", "10L": "v22", "12L": "v23"}
IN_TRANSFORMER_LENS_FORM = {
    "ArthurConmy/redwood_attn_2l": "",
    "Baidicoot/Othello-GPT-Transformer-Lens": "othello-gpt",
    "NeelNanda/Attn-Only-2L512W-Shortformer-6B-big-lr": "attn-only-2l-demo attn-only-2l-shortformer-6b-big-lr "
    "attn-only-2l-induction-demo attn-only-demo",
    **{f"NeelNanda/SoLU_{n}512W_Wiki_Finetune": f"solu-{n}-wiki solu-{n}-wiki-finetune solu-{n}-finetune"
       for n in ("1L", "4L")},
    **{f"NeelNanda/SoLU_{n}_{version}_old": f"solu-{n}-pile solu-{n}-old" for n, version in _TOYS_OF_OLD.items()},
    **{f"NeelNanda/{pattern.format(n)}": f"{kind}-{n} {kind}-{n}-new {kind}-{n}-c4-code"
       for pattern, (sizes, kind) in _TOYS.items() for n in sizes.split()},
}  # fmt: skip
"""Models in TransformerLens's own format: hub id → short names."""

CHECKPOINTS_AS_FILES = frozenset(repo for repo in IN_TRANSFORMER_LENS_FORM if repo.startswith("NeelNanda/"))
"""Hub ids whose training checkpoints are files in one revision, not revisions."""

_PYTHIA = {
    "14m": "", "31m": "", "70m": "19m", "160m": "125m", "410m": "350m", "1b": "800m", "1.4b": "1.3b",
    "2.8b": "2.7b", "6.9b": "6.7b", "12b": "13b",
}  # fmt: skip
_STANFORD = {
    "small": ("alias", 21, "battlestar", 49, "caprica", 81, "darkmatter", 343, "expanse", 777),
    "medium": ("arwen", 21, "beren", 49, "celebrimbor", 81, "durin", 343, "eowyn", 777),
}
_ONLY_FROM_META = {f"llama-{size}{end}" for size in ("7b", "13b", "30b", "65b") for end in ("", "-hf")}


def _published() -> Iterator[tuple[str, str]]:
    """Yields hub ids, each with the short names (separated by spaces) that :func:`_names` does not derive."""
    yield from _OTHERS.items()
    yield from IN_TRANSFORMER_LENS_FORM.items()
    for pattern, sizes, kinds in _REGULAR:
        yield from ((pattern.format(*parts), "") for parts in itertools.product(sizes.split(), kinds))
    for size, old in _PYTHIA.items():
        variants = ["", "-deduped", "-v0", "-deduped-v0"] if old else [""]
        seeds = ["-seed1", "-seed2", "-seed3"] if size == "160m" else []
        for variant in variants + seeds:
            former = f"EleutherAI/pythia-{old}{variant} pythia-{old}{variant}" if old else ""
            bare = f"pythia{variant}" if size == "70m" and variant in ("", "-v0") else ""
            yield f"EleutherAI/pythia-{size}{variant}", f"{former} {bare}"
    for size, names in _STANFORD.items():
        for letter, name, seed in zip("abcde", names[::2], names[1::2], strict=True):
            starts = ("stanford-gpt2", "gpt2-stanford", "gpt2-mistral")
            short = " ".join(f"{start}-{size}-{letter}" for start in starts)
            misnamed = f"gpt2-medium-small-{letter}" if size == "medium" else ""
            yield f"stanford-crfm/{name}-gpt2-{size}-x{seed}", f"{short} {misnamed}"


def _names(repo: str) -> Iterator[str]:
    """Yields the names derived from a hub id: itself, without its owner, and as TransformerLens shortens it."""
    name = repo.rpartition("/")[2].lower()
    short = name.removeprefix("meta-").removesuffix("-hf")
    for long, brief in (("tinystories", "tiny-stories"), ("instuct", "instruct"), ("1layer", "1l"), ("2layers", "2l")):
        short = short.replace(long, brief)
    yield from (repo.lower(), name, short)


ALIASES: dict[str, str] = {
    name: repo for repo, others in _published() for name in (*_names(repo), *others.lower().split())
}
"""Lower-case name or id → hub id."""


def hub_id(name: str) -> str:
    """Returns the hub id for a name: an alias, in upper or lower case, or any ``owner/name``.

    >>> hub_id("gpt2-small"), hub_id("Pythia-70M"), hub_id("someone/some-model")
    ('openai-community/gpt2', 'EleutherAI/pythia-70m', 'someone/some-model')
    """
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~")):
        return name
    if name.lower() in _ONLY_FROM_META:
        raise CheckpointError(
            f"{name!r} has no public repository: get Llama 1 from Meta, convert it to the Hugging Face format and pass "
            "its directory, or pass the hub id of a copy."
        )
    raise CheckpointError(
        f"{name!r} is neither a directory, nor a known model name, nor a hub id of the form 'owner/name'."
        f"{nearest(name.lower(), ALIASES)}"
    )


def checkpoint_labels(repo: str) -> tuple[tuple[int, ...], str]:
    """Returns the published training checkpoints of a hub id, and the prefix of their revisions.

    >>> checkpoint_labels("EleutherAI/pythia-70m")[0][:6]
    (0, 1, 2, 4, 8, 16)

    Raises:
        InputError: the model has no known training checkpoints.
    """
    owner, _, name = repo.partition("/")
    if owner == "EleutherAI" and name.startswith("pythia"):
        early = () if "-v0" in name else (0, *(2**i for i in range(10)))
        return (*early, *range(1000, 143001, 1000)), "step"
    if owner == "stanford-crfm":
        spans = ((0, 100, 10), (100, 2000, 50), (2000, 20000, 100), (20000, 400001, 1000))
        return tuple(step for span in spans for step in range(*span)), "checkpoint-"
    if repo in CHECKPOINTS_AS_FILES:
        raise InputError(
            f"tljax knows no training checkpoints of {repo} without asking the hub, where they are files: load "
            "one with checkpoint_index= or checkpoint_value=; a number that there is none of names the nearest."
        )
    raise InputError(
        f"tljax knows no training checkpoints of {repo}. Pass revision= with a branch, tag or commit instead."
    )


def checkpoint_revision(repo: str, value: int | None, index: int | None) -> str:
    """Returns the revision of a training checkpoint, chosen by its step or by its index in the list."""
    labels, prefix = checkpoint_labels(repo)
    return f"{prefix}{choose_checkpoint(repo, labels, value, index)}"


def choose_checkpoint(repo: str, labels: Sequence[int], value: int | None, index: int | None) -> int:
    """Returns the step of a training checkpoint: ``value``, or the one at ``index`` in ``labels``."""
    if value is None and index is not None:
        if not -len(labels) <= index < len(labels):
            raise InputError(f"checkpoint_index={index} is out of range: {repo} has {len(labels)} checkpoints.")
        value = labels[index]
    if value is None or value not in labels:
        close = sorted(labels, key=lambda label: abs(label - (value or 0)))[:2]
        nearest_ones = f"the nearest are {sorted(close)}" if close else "there are none"
        raise InputError(f"{repo} has no checkpoint at step {value}: {nearest_ones}.")
    return value
