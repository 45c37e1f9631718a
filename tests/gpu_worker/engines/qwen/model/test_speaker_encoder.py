import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.model.speaker_encoder import SpeakerEncoder
from tests.checkpoints import Size, tiny
from tests.gpu_worker.engines.qwen.parity import official

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", ["0b6", "1b7"])
def test_embeddings_are_the_official_ones(size: Size) -> None:
    """Bit for bit, for both sizes. Different recordings have different embeddings."""
    encoder = SpeakerEncoder(tiny("base", size), dtype=torch.float32, device=CPU)
    embeddings = []
    for samples in (12_000, 48_000):
        pcm = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
        embeddings.append(encoder(torch.from_numpy(pcm)))
        assert torch.equal(embeddings[-1], official("base", size).model.extract_speaker_embedding(pcm, 24_000))

    assert embeddings[0].shape == ({"0b6": 64, "1b7": 96}[size],)
    assert not torch.allclose(embeddings[0], embeddings[1])


def test_the_embedding_has_the_encoders_dtype() -> None:
    """The whole encoder runs in it, as in the official model."""
    encoder = SpeakerEncoder(tiny("base"), dtype=torch.bfloat16, device=CPU)

    assert encoder(torch.randn(24_000) * 0.1).dtype is torch.bfloat16
    assert {tensor.dtype for tensor in encoder.tensors()} == {torch.bfloat16}


def test_a_configuration_that_does_not_fit_the_weights_is_refused(tmp_path: Path) -> None:
    """The error names config.json."""
    target = tmp_path / "model"
    shutil.copytree(tiny("base"), target, copy_function=lambda a, b: Path(b).hardlink_to(a))
    path = target / "config.json"
    content = json.loads(path.read_text())
    content["speaker_encoder_config"]["enc_se_channels"] = 32
    path.unlink()
    path.write_text(json.dumps(content))

    with pytest.raises(JobError, match=r"its speaker encoder does not fit config\.json"):
        SpeakerEncoder(target, dtype=torch.float32, device=CPU)
