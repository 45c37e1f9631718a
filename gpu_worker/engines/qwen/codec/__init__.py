"""The 12 Hz speech codec: decodes streams of codes to waveforms, and encodes recordings to codes.

It owns the weights of the speech tokenizer and the arithmetic of its decoder. Nothing else decodes or encodes audio.
"""

from gpu_worker.engines.qwen.codec.codec import Codec, can_be_quantized
from gpu_worker.engines.qwen.codec.decoder_state import DecoderState, StreamSnapshot

__all__ = ["Codec", "DecoderState", "StreamSnapshot", "can_be_quantized"]
