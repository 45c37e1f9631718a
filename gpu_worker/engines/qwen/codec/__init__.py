"""The 12 Hz speech codec: decodes streams of codes to waveforms, and encodes recordings to codes.

It owns the weights of the speech tokenizer and the arithmetic of its decoder. Nothing else decodes or encodes audio.
"""

from gpu_worker.engines.qwen.codec.codec import Codec as Codec
from gpu_worker.engines.qwen.codec.codec import can_be_quantized as can_be_quantized
from gpu_worker.engines.qwen.codec.codec import stream_bytes as stream_bytes
from gpu_worker.engines.qwen.codec.decoder_state import DecoderState as DecoderState
from gpu_worker.engines.qwen.codec.decoder_state import StreamSnapshot as StreamSnapshot
