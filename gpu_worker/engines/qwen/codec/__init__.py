"""The 12 Hz speech codec: codes to waveform as a stream, and recordings to codes."""

from gpu_worker.engines.qwen.codec.codec import MAX_CHUNK, Codec
from gpu_worker.engines.qwen.codec.codec_config import FRAME_SAMPLES
from gpu_worker.engines.qwen.codec.decoder_state import DecoderState, Snapshot

__all__ = ["FRAME_SAMPLES", "MAX_CHUNK", "Codec", "DecoderState", "Snapshot"]
