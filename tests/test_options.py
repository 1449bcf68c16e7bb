"""Bundles of options agree with the functions that receive them; a misspelt argument is named with the nearest."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import pytest

from tljax import ActivationCache, HookedTransformer
from tljax.attribution.options import EstimateOptions, read_estimate
from tljax.checkpoints import load_checkpoint, load_transformer_lens
from tljax.checkpoints.loading import LoadOptions, ReadOptions
from tljax.dictionaries.pages.summary import SummaryOptions, summarise_features
from tljax.dictionaries.training.loop import Loop, LoopOptions
from tljax.errors import ArgumentError
from tljax.generation.methods import GenerateOptions, begin
from tljax.generation.sampling import SamplingOptions, read_sampling
from tljax.harvest.harvest import HarvestOptions, to_disk
from tljax.model.hooked_transformer import PretrainedOptions
from tljax.text.inputs import prepare
from tljax.typing import InputOptions, PromptOptions
from tljax.viz.heatmap import HeatmapOptions, heatmap
from tljax.viz.lens_table import FigureOptions, TableOptions, logit_lens_figure, logit_lens_table
from tljax.weights.steps import STEPS, ProcessingOptions, Steps

BUNDLES: dict[str, tuple[type, Callable[..., Any]]] = {
    "input": (InputOptions, prepare),
    "sampling": (SamplingOptions, read_sampling),
    "generation": (GenerateOptions, begin),
    "processing": (ProcessingOptions, Steps.for_config),
    "loading": (LoadOptions, load_checkpoint),
    "a state dict": (ReadOptions, load_transformer_lens),
    "a heat map": (HeatmapOptions, heatmap),
    "an estimate": (EstimateOptions, read_estimate),
    "a lens's table": (TableOptions, logit_lens_table),
    "a lens's figure": (FigureOptions, logit_lens_figure),
    "training of dictionaries": (LoopOptions, Loop),
    "harvest": (HarvestOptions, to_disk),
    "pages of features": (SummaryOptions, summarise_features),
    "from_pretrained": (PretrainedOptions, HookedTransformer.from_pretrained),
}
SEVERAL = 2
"""Arguments from which on a name can be mistaken for another."""


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_is_what_its_receiver_takes(name: str) -> None:
    bundle, receiver = BUNDLES[name]
    parameters = inspect.signature(receiver).parameters.values()
    takes = {one.name: one.annotation for one in parameters if one.kind is one.KEYWORD_ONLY}
    declared = get_type_hints(bundle)
    assert declared.keys() == takes.keys()
    assert {name: kind for name, kind in declared.items() if takes[name] not in (Any, kind)} == {}


def test_help_shows_each_option_with_its_default(tiny: HookedTransformer) -> None:
    shown = inspect.signature(tiny.generate).parameters
    assert set(get_type_hints(GenerateOptions)) < set(shown)
    assert (shown["temperature"].default, shown["do_sample"].default, shown["seed"].default) == (1.0, True, None)
    assert inspect.signature(HookedTransformer.from_pretrained).parameters["fold_ln"].default is True
    without = inspect.signature(HookedTransformer.from_pretrained_no_processing).parameters
    assert str(without["fold_ln"]) == "fold_ln: bool = ..."  # another default than that of what it is passed on to
    assert set(STEPS) < set(without)


def methods(cls: type) -> Iterator[Any]:
    """Public methods of a class and its constructor, if they have several arguments and a known list of them."""
    for name in dir(cls):
        method = getattr(cls, name)
        if (name.startswith("_") and name not in ("__init__", "__call__")) or not inspect.isroutine(method):
            continue
        ours = getattr(method, "__module__", "").startswith("tljax") and not name.startswith("tree_")
        arguments = [one for one in inspect.signature(method).parameters.values() if one.name not in ("self", "cache")]
        if ours and len(arguments) >= SEVERAL and not any(one.kind is one.VAR_KEYWORD for one in arguments):
            yield pytest.param(cls, name, arguments[-1].name, id=f"{cls.__name__}.{name}")


@pytest.mark.parametrize(("cls", "name", "argument"), [*methods(HookedTransformer), *methods(ActivationCache)])
def test_a_misspelt_argument_is_named_with_the_nearest(
    tiny: HookedTransformer, cls: Any, name: str, argument: str
) -> None:
    instance = tiny if cls is HookedTransformer else ActivationCache({}, tiny)
    with pytest.raises(ArgumentError, match=f"has no option '{argument}x'. Did you mean '{argument}'") as caught:
        getattr(instance, name)(**{f"{argument}x": None})
    assert isinstance(caught.value, TypeError)


def test_what_goes_by_name_is_not_taken_by_position(tiny: HookedTransformer) -> None:
    with pytest.raises(ArgumentError, match=r"generate takes input, max_new_tokens by position, and by name: .*top_k="):
        tiny.generate("When John", 2, False)  # type: ignore[arg-type]


def test_options_are_checked_as_arguments_are(tiny: HookedTransformer) -> None:
    with pytest.raises(ArgumentError, match=r"__call__ has no option 'prepend_boss'. Did you mean 'prepend_bos'"):
        tiny("When John", prepend_boss=True)  # type: ignore[call-arg]
    assert set(get_type_hints(PromptOptions)) == {"prepend_bos", "padding_side", "attention_mask"}
