"""`python -m tests.benchmarks.first_audio`: time to first audio in the engine, on a virtual device. No GPU is needed.

The table shows the order of work alone: the times of the device and of the host are estimates, see simulation.py.
HTTP and the encoding of audio are not included.
"""

import pytest

from tests.gpu_worker.engines.qwen import simulation
from tests.gpu_worker.engines.qwen.virtual_cuda import install


def main() -> None:
    """Print a table of the median and the 95th percentile at several rates."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda = install(monkeypatch, simulation.device_time, computes=False)
        engine = cuda.engine(slots=64, dtype="bfloat16")
        print("requests a second | p50 ms | p95 ms")
        for rate in simulation.SECONDS:
            p50, p95 = simulation.first_audio(cuda, engine, rate)
            print(f"{rate:17} | {p50 * 1000:6.1f} | {p95 * 1000:6.1f}")


if __name__ == "__main__":
    main()
