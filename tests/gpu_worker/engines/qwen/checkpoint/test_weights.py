import torch

from gpu_worker.engines.qwen.checkpoint.weights import load_codec_weights, load_weights
from tests.checkpoints import tiny


def test_weights_are_loaded_by_prefix() -> None:
    """The tensors of the model and of the codec have their full names and the requested dtype."""
    speaker_encoder = load_weights(tiny("base"), "speaker_encoder.", dtype=torch.float16)
    codec = load_codec_weights(tiny("base"), "decoder.", dtype=None)

    assert speaker_encoder
    assert all(name.startswith("speaker_encoder.") and w.dtype is torch.float16 for name, w in speaker_encoder.items())
    assert codec["decoder.pre_conv.conv.bias"].dtype is torch.float32
