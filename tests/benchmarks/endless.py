"""Random checkpoints that never predict end of speech: `python -m tests.benchmarks.endless --size tiny`.

Every request then has exactly `max_new_tokens` frames, over HTTP as well: the server needs no switch for that.
Prints the directory, which is kept under `.cache/checkpoints/`.
"""

import argparse
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Final

from tests.checkpoints import CACHE, CODEC_EOS, Size, checkpoint_name, tiny, write

SIZES: Final[dict[str, Size]] = {"tiny": "0b6", "0.6B": "0b6", "1.7B": "1b7"}
_HEAD: Final = "talker.codec_head.weight"


def endless(size: str) -> Path:
    """The directory of a CustomVoice checkpoint of `size`, a key of SIZES; made on first use."""
    source = tiny("custom_voice") if size == "tiny" else None
    # The folder of small checkpoints is named after the code that made them.
    key = source.parents[1].name if source else f"full-{size}"
    target = CACHE / "endless" / key / checkpoint_name("custom_voice", SIZES[size])
    if target.is_dir():
        return target
    scratch = target.with_name(f"{target.name}.{os.getpid()}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    if source:
        shutil.copytree(source, scratch)
    else:
        write(scratch, "custom_voice", SIZES[size], full=True)
    silence_end(scratch / "model.safetensors")
    try:
        scratch.rename(target)
    except OSError:  # another process has made it
        shutil.rmtree(scratch)
        if not target.is_dir():
            raise
    return target


def silence_end(weights: Path) -> None:
    """Zero the end-of-speech row of the codebook-0 head, in place.

    Its logit is then always 0, far below the 50 largest of 2049 random ones, and only those are sampled.
    """
    with weights.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        head = json.loads(file.read(size))[_HEAD]
        begin, end = head["data_offsets"]
        row = (end - begin) // head["shape"][0]
        file.seek(8 + size + begin + CODEC_EOS * row)
        file.write(bytes(row))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.endless", description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    print(endless(parser.parse_args().size))


if __name__ == "__main__":
    main()
