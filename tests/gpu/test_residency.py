"""Offloading a full-size model on a CUDA device, by the driver's own number."""

import time
from pathlib import Path

import pytest
import torch

from gpu_worker.engines.base import Job, Pcm, Sampling
from gpu_worker.memory import open_probe
from gpu_worker.registry import Registry
from shared.catalog import load_catalog
from shared.settings import load_settings
from tests.checkpoints import write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1200),
]

MODEL = "qwen3-tts-1.7b-customvoice"


def test_offload_returns_the_bytes_and_restore_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what a 1.7B model is measured to hold 95 % go back to the driver; the time until it speaks is printed."""
    checkpoint = tmp_path / "checkpoint"
    write(checkpoint, "custom_voice", "1b7", full=True)
    settings = load_settings({"TTS_MODEL_PATHS": f"{MODEL}={checkpoint}", "TTS_MAX_CONCURRENCY": "8"})
    catalog = load_catalog()
    probe = open_probe("cuda")
    engine = Registry(settings, catalog, "cuda").open(next(spec for spec in catalog if spec.id == MODEL))
    probe.reclaim(collect=True)
    measured = sum(engine.memory().device.values())
    resident = probe.device().used_bytes

    engine.offload()
    probe.reclaim(collect=False)
    assert resident - probe.device().used_bytes >= 0.95 * measured

    began = time.monotonic()
    engine.restore()
    sampling = Sampling(seed=1, max_new_tokens=4)
    engine.admit(Job(id="a", task="CustomVoice", text="Good morning.", voice="ryan", sampling=sampling))
    while not any(isinstance(event, Pcm) for event in engine.step(())):
        assert engine.runnable(())
    with capsys.disabled():
        print(f"\nrestore to first frame, 1.7B: {(time.monotonic() - began) * 1000:.0f} ms")  # noqa: T201 -- the figure
    engine.close()
