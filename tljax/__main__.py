"""``python -m tljax``: trace which activations of a trained model decide between two answers."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tljax import demo
from tljax.errors import TljaxError
from tljax.model.hooked_transformer import HookedTransformer

DESCRIPTION = """\
Activation patching on a trained model.

Runs a clean and a corrupted prompt, then puts one clean activation at a time into the corrupted run: where that brings
the clean answer back, the model keeps what decides it. Sweeps the residual stream (layer by position) and every
attention head (layer by head), finds the induction heads, prints what it found, and saves heat maps as PNG.
Without options it uses the bundled model tljax-tiny and needs no network."""

EXAMPLES = """\
examples:
  python -m tljax
  python -m tljax --model gpt2-small
  python -m tljax --clean "The Eiffel Tower is in the city of" --corrupted "The Colosseum is in the city of" \\
                  --answer " Paris" --wrong " Rome" --model path/to/checkpoint
  python -m tljax --json > findings.json

The two prompts must have the same number of tokens; --answer and --wrong are single tokens, usually with a leading
space as they stand in running text."""


def parser() -> argparse.ArgumentParser:
    """Returns the command-line parser."""
    result = argparse.ArgumentParser(
        "python -m tljax",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--model",
        default="tljax-tiny",
        help="alias, hub id or checkpoint directory (default: the bundled tljax-tiny)",
    )
    result.add_argument("--clean", default=demo.CLEAN, help="prompt that gets --answer (default: %(default)r)")
    result.add_argument("--corrupted", default=demo.CORRUPTED, help="the same prompt changed so that it gets --wrong")
    result.add_argument(
        "--answer",
        default=demo.ANSWER,
        help="token expected after the clean prompt (default: %(default)r)",
    )
    result.add_argument(
        "--wrong",
        default=demo.WRONG,
        help="token expected after the corrupted prompt (default: %(default)r)",
    )
    result.add_argument(
        "--out",
        type=Path,
        default=Path("tljax-out"),
        metavar="DIR",
        help="where the pictures go (default: %(default)s)",
    )
    result.add_argument("--json", action="store_true", help="print the findings as JSON instead of text")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status (2 for a mistake in the options)."""
    options = parser().parse_args(arguments)
    try:
        model = HookedTransformer.from_pretrained(options.model)
        findings = demo.investigate(model, options.clean, options.corrupted, options.answer, options.wrong)
        pictures = demo.save_pictures(findings, options.out)
    except TljaxError as error:
        print(f"tljax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tljax: cannot write to {options.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(findings.to_json() | {"pictures": [str(path) for path in pictures]}, indent=2))
        return 0
    for line in demo.report(findings):
        print(line)
    print(f"\nHeat maps: {', '.join(map(str, pictures))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
