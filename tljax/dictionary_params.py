"""Where the arrays of spliced dictionaries lie among a model's parameters.

A dictionary at a point of a block is in ``params["blocks"][layer]["dictionaries"]`` under the point's name within the
block, one at a point of the embedding in ``params["dictionaries"]``. So whatever is given a block's parameters has its
dictionaries as well.
"""

from collections.abc import Mapping
from typing import Any

from tljax.offload import HostBlocks
from tljax.typing import Params

DICTIONARIES = "dictionaries"


def without_dictionaries(params: Params) -> Params:
    """Returns the parameters of the model itself; without any dictionary that is ``params``, as it is."""
    blocks = params.get("blocks", ())
    if isinstance(blocks, HostBlocks):
        own = {name: part for name, part in params.items() if name != DICTIONARIES}
        return {**own, "blocks": blocks.with_beside({})} if DICTIONARIES in params or blocks.beside else params
    if DICTIONARIES not in params and not any(isinstance(block, Mapping) and DICTIONARIES in block for block in blocks):
        return params
    own = {name: part for name, part in params.items() if name != DICTIONARIES}
    return {**own, "blocks": tuple({k: v for k, v in block.items() if k != DICTIONARIES} for block in blocks)}


def dictionaries_in(params: Params) -> dict[str, Any]:
    """Returns the spliced dictionaries by the full name of the point that they write."""
    found = dict(params.get(DICTIONARIES, {}))
    blocks = params.get("blocks", ())
    for layer, block in blocks.beside.items() if isinstance(blocks, HostBlocks) else enumerate(blocks):
        if isinstance(block, Mapping):
            found |= {f"blocks.{layer}.{name}": one for name, one in block.get(DICTIONARIES, {}).items()}
    return found


def with_dictionaries(params: Params, dictionaries: Mapping[str, Any]) -> Params:
    """Returns the parameters with these dictionaries, by full name, in place of those that are there."""
    own = without_dictionaries(params)
    outside = {name: one for name, one in dictionaries.items() if not name.startswith("blocks.")}
    inside: dict[int, dict[str, Any]] = {}
    for name in dictionaries.keys() - outside.keys():
        _, layer, relative = name.split(".", 2)
        inside.setdefault(int(layer), {})[relative] = dictionaries[name]
    if not inside and not outside:
        return own
    spliced = {layer: {DICTIONARIES: dict(sorted(ones.items()))} for layer, ones in sorted(inside.items())}
    blocks = own["blocks"]
    if isinstance(blocks, HostBlocks):
        blocks = blocks.with_beside(spliced)
    else:
        blocks = tuple({**block, **spliced[layer]} if layer in spliced else block for layer, block in enumerate(blocks))
    return {**own, "blocks": blocks, **({DICTIONARIES: outside} if outside else {})}
