"""Turns the Python standard library's own sources into a Megatron indexed data set.

One byte is one token (0..255), token 256 ends a document. The running interpreter always has these
files, so the demo needs no download; they are read in sorted order, so the data set is the same
for every run of one interpreter.

Usage: python launch/demo/corpus.py --output PREFIX [--max-mebibytes 4]
"""

import argparse
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257


def documents(library: Path, max_bytes: int) -> Iterator[bytes]:
    """Contents of the library's ``.py`` files in sorted order, ``max_bytes`` in all.

    Args:
        library: folder of the standard library; installed packages and tests are left out.
        max_bytes: the last document is cut so that no more is read.
    """
    left = max_bytes
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests"} & set(
            path.relative_to(library).parts
        ):
            continue
        text = path.read_bytes()[:left]
        if text:
            left -= len(text)
            yield text
        if left == 0:
            return


def write(prefix: Path, library: Path, max_bytes: int) -> int:
    """Write ``prefix.bin`` and ``prefix.idx``; they appear under those names only when complete.

    Returns:
        The number of tokens written.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own per process: several ranks may start this at once.
    partial = f"{prefix}.{os.getpid()}"
    builder = IndexedDatasetBuilder(get_bin_path(partial), dtype=np.uint16)
    num_tokens = 0
    for text in documents(library, max_bytes):
        tokens = np.append(np.frombuffer(text, dtype=np.uint8), END_OF_DOCUMENT).astype(np.uint16)
        builder.add_document(tokens, [tokens.size])
        num_tokens += tokens.size
    builder.finalize(get_idx_path(partial))
    os.replace(get_bin_path(partial), get_bin_path(str(prefix)))
    os.replace(get_idx_path(partial), get_idx_path(str(prefix)))
    return num_tokens


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="path prefix of the two files")
    parser.add_argument("--max-mebibytes", type=int, default=4, help="how much source to take")
    options = parser.parse_args()
    library = Path(sysconfig.get_paths()["stdlib"])
    num_tokens = write(options.output, library, options.max_mebibytes << 20)
    if num_tokens == 0:
        parser.error(f"no Python sources in {library}: run it with an interpreter that has them")
    print(f"{options.output}: {num_tokens} byte tokens of {library}, vocabulary {VOCAB_SIZE}")


if __name__ == "__main__":
    main()
