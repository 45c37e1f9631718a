"""The cost of leniency for a request: `python -m tests.benchmarks.leniency`.

Each body is decoded by msgspec alone, strictly and with known fields only, and by the server's own decoder.
The figures are processor time, the best of several rounds: nothing else is measured but the decoding.
"""

import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from server.http.json_bodies import JsonDecoder
from server.schemas import ALIASES, SpeechRequest
from tests.benchmarks import machine

ROUNDS: Final = 7
REPEATS: Final = 2000

_PLAIN: Final = {"model": "tts-1", "voice": "alloy", "input": "Good morning, this is a short sentence."}
_STYLE: Final = {"instructions": "softly", "response_format": "mp3", "speed": 1.0, "stream": True, "language": "en"}
_SAMPLING: Final = {"seed": 42, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.05}
_LIMITS: Final = {"max_new_tokens": 500, "non_streaming_mode": False, "keep_alive": "5m"}
_EVERY: Final = _PLAIN | _STYLE | _SAMPLING | _LIMITS | {"task_type": "CustomVoice", "stream_format": "audio"}
_STRINGS: Final = {name: f" {value} ".title() for name, value in _EVERY.items() if name != "keep_alive"}
BODIES: Final[dict[str, bytes]] = {
    "three fields": msgspec.json.encode(_PLAIN),
    "every field": msgspec.json.encode(_EVERY),
    "every field as a string in another case": msgspec.json.encode(_STRINGS),
    "4,096 characters": msgspec.json.encode(_PLAIN | {"input": "x" * 4096}),
    "half an emoji": msgspec.json.encode(_PLAIN).replace(b"Good", rb"\ud83d"),
}


def main() -> None:
    """Measure, and print the table."""
    print("\n".join(f"- {line}" for line in machine.describe()))
    print(f"- best of {ROUNDS} rounds of {REPEATS} decodings, processor time\n")
    print("| body | strict, by msgspec µs | as the server takes it µs |\n|---|---|---|")
    decoder, strict = JsonDecoder(SpeechRequest, ALIASES), msgspec.json.Decoder(SpeechRequest)
    for name, body in BODIES.items():
        alone = f"{microseconds(lambda body=body: strict.decode(body)):.1f}" if is_strict(body) else "refused"  # type: ignore[misc]
        print(f"| {name} | {alone} | {microseconds(lambda body=body: decoder.decode(body, '')):.1f} |")  # type: ignore[misc]


def is_strict(body: bytes) -> bool:
    """True if msgspec takes `body` without leniency."""
    try:
        msgspec.json.decode(body, type=SpeechRequest)
    except msgspec.DecodeError:
        return False
    return True


def microseconds(decode: Callable[[], Any]) -> float:
    """The processor time of one call."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(REPEATS):
            decode()
        best = min(best, time.process_time() - began)
    return best / REPEATS * 1e6


if __name__ == "__main__":
    main()
