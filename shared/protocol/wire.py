"""Messages as frames: encode and decode, and the bytes of the heartbeat."""

from typing import Any, Final

import msgspec

from shared.protocol.messages import VERSION, FromWeb, FromWorker, Message

STARTING: Final = b"s"
READY: Final = b"r"
"""A GPU worker writes one of them into its supervisor's pipe every second: READY once its models are preloaded."""


class ProtocolError(Exception):
    """The frames are not a message of this protocol. `unanswered` is the id of the Speak or Call that they may be."""

    def __init__(self, message: str, unanswered: str = "") -> None:
        super().__init__(message)
        self.unanswered = unanswered


class _Beginning(msgspec.Struct, frozen=True, kw_only=True):
    """What tells who waits for the answer to a message."""

    type: str
    id: str


_encoder = msgspec.msgpack.Encoder()
_from_web: msgspec.msgpack.Decoder[FromWeb] = msgspec.msgpack.Decoder(FromWeb)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_beginning: msgspec.msgpack.Decoder[_Beginning] = msgspec.msgpack.Decoder(_Beginning)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode(message: Message, payload: bytes | None = None) -> list[bytes]:
    """The frames of `message` for send_multipart."""
    header = _encoder.encode(message)
    return [header] if payload is None else [header, payload]


def decode_from_web(frames: list[bytes]) -> tuple[FromWeb, bytes | None]:
    """The message of a web worker, and its payload; ProtocolError if it is none."""
    return _decode(_from_web, frames)


def decode_from_worker(frames: list[bytes]) -> tuple[FromWorker, bytes | None]:
    """The message of the GPU worker, and its payload; ProtocolError if it is none."""
    return _decode(_from_worker, frames)


def _decode(decoder: Any, frames: list[bytes]) -> tuple[Any, bytes | None]:
    match frames:
        case [header]:
            payload = None
        case [header, payload]:
            pass
        case _:
            raise ProtocolError(f"a message has one or two frames, not {len(frames)}")
    try:
        return decoder.decode(header), payload
    except _UNREADABLE as error:
        raise ProtocolError(f"not a message of version {VERSION}: {error}", _unanswered(header)) from error


def _unanswered(header: bytes) -> str:
    """The id of a Speak or Call of which another part cannot be read; "" for all other messages."""
    try:
        message = _beginning.decode(header)
    except _UNREADABLE:
        return ""
    return message.id if message.type in {"Speak", "Call"} else ""
