"""The official package's speed: `python -m tests.benchmarks.official DIRECTORY` prints milliseconds a frame.

One stream, one request after the other: the package neither streams nor batches continuously.
The benchmarks that compare with it call this module in the same run.
"""

import argparse
import time
from pathlib import Path
from typing import Any, Final

import torch

from gpu_worker.engines.qwen.build import compute_dtype
from gpu_worker.engines.qwen.checkpoint.model_config import read_config
from tests.benchmarks.stages import Clock
from tests.official_package import official_package

TEXT: Final = "Hello world, good morning to the speech of today."
RUNS: Final = 2
"""After a warm-up run; the faster one counts."""


def frame_ms(directory: Path, frames: int, device: str, dtype: torch.dtype, clock: Clock) -> float:
    """Milliseconds a frame of one stream, codec included, over runs of `frames` forced frames."""
    model = official_package().Model.from_pretrained(
        str(directory), dtype=dtype, attn_implementation="sdpa", device_map=device
    )
    config = read_config(directory)
    talk = model.model.talker.generate

    def forced(**kwargs: Any) -> Any:
        # The official package makes one frame less.
        return talk(**{**kwargs, "min_new_tokens": frames, "max_new_tokens": frames + 1})

    model.model.talker.generate = forced

    def speak() -> None:
        if config.tts_model_type == "custom_voice":
            model.generate_custom_voice(text=TEXT, speaker=next(iter(config.talker_config.spk_id)), language="english")
        else:
            model.generate_voice_design(text=TEXT, instruct="a deep voice", language="english")

    speak()
    times = []
    for _ in range(RUNS):
        start = clock()
        speak()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 1000 * min(times) / frames


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.official", description=__doc__)
    parser.add_argument("directory", type=Path, help="of a CustomVoice or VoiceDesign checkpoint")
    parser.add_argument("--frames", type=int, default=75, help="forced frames, 80 ms each")
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(device, arguments.dtype)
    print(f"{frame_ms(arguments.directory, arguments.frames, device, dtype, clock):.2f}")


if __name__ == "__main__":
    main()
