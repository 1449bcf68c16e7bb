"""Dictionaries at gpt2-small's shape: harvest, training, decoding with a spliced dictionary, against their peers.

Needs the ``[bench]`` extra. Every part is a file of its own, ``_dictionaries_<part>.py``, with a function ``<part>``
that prints a table and returns its rows; a row says under ``met`` whether it met its bar::

    python benchmarks/dictionaries.py --parts harvest --json results.json
"""

import argparse
import importlib
import os
import warnings
from pathlib import Path

from _timing import machine, use_threads, write_json

PARTS = ("harvest", "decode", "training")


def main() -> int:
    """Prints the tables; the exit status says whether every bar was met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of all contestants")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    warnings.simplefilter("ignore")
    results = {
        part: getattr(importlib.import_module(f"_dictionaries_{part}"), part)(arguments) for part in arguments.parts
    }
    info = machine("jax")
    print(", ".join(f"{key} {value}" for key, value in info.items()))
    write_json(arguments.json, {"machine": info, **results})
    return int(any(row.get("met") == "NO" for rows in results.values() for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
