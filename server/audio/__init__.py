"""Audio on the web side: answers are encoded, uploads are decoded in a process pool, ref_audio URLs are fetched.

Outsiders import the names below, never a module of the package.
Each name loads its module on first use, because `python -m server.audio.decoder` imports this file too:
a decoding process starts for each upload and must be ready in 80 ms.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.audio.decoder import MAX_REFERENCE_BYTES
    from server.audio.decoder_pool import DecoderPool
    from server.audio.encoder import Encoder, effective_speed, load_resampler
    from server.audio.formats import CONTENT_TYPES, SAMPLE_RATES, Format, default_rate
    from server.audio.provenance import Provenance
    from server.audio.store import AudioFacts, AudioStore, StoredAudio
    from server.audio.tempo import MAX_SPEED, MIN_SPEED
else:
    _MODULE_OF = {
        "MAX_REFERENCE_BYTES": "decoder",
        "DecoderPool": "decoder_pool",
        "Encoder": "encoder",
        "effective_speed": "encoder",
        "load_resampler": "encoder",
        "CONTENT_TYPES": "formats",
        "SAMPLE_RATES": "formats",
        "Format": "formats",
        "default_rate": "formats",
        "Provenance": "provenance",
        "AudioFacts": "store",
        "AudioStore": "store",
        "StoredAudio": "store",
        "MAX_SPEED": "tempo",
        "MIN_SPEED": "tempo",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


__all__ = [
    "CONTENT_TYPES",
    "MAX_REFERENCE_BYTES",
    "MAX_SPEED",
    "MIN_SPEED",
    "SAMPLE_RATES",
    "AudioFacts",
    "AudioStore",
    "DecoderPool",
    "Encoder",
    "Format",
    "Provenance",
    "StoredAudio",
    "default_rate",
    "effective_speed",
    "load_resampler",
]
