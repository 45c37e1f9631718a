"""`say --live`: sends the text on stdin to the service as it arrives, and writes the audio as it arrives.

A long text is sent as several utterances, cut at sentences, because the service limits the length of one.
The service sends pcm. This module encodes all of it as one stream.
"""

import codecs
import json
import os
import select
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, BinaryIO, Final

import websockets
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection, connect

from server.audio import Encoder, Provenance, default_rate
from server.commands.client import Client, ClientError, is_local, message_of, unreachable
from server.text import end_of_last_sentence

QUIET_S: Final = 5.0
"""After so many seconds without new text the service speaks what it has, also an unfinished sentence."""

_UTTERANCE_CHARS: Final = 1000
"""An utterance of so many characters ends with its sentence."""

_LONGEST_UTTERANCE_CHARS: Final = 3000
"""A text without sentences is cut here."""

_WAITING: Final = 8
"""Utterances that the service may have; a faster writer waits."""

_PIECE_BYTES: Final = 16_384


def speak_live(
    client: Client,
    fields: Mapping[str, Any],
    source: int,
    target: BinaryIO,
    *,
    audio_format: Any,
    streaming: bool,
    labelled: bool,
) -> None:
    """Speak what the file descriptor `source` brings, to its end. Raises ClientError.

    `fields` are those of a request for speech. With `streaming` the audio is written as it comes, else at the end.
    `labelled`: the file says that its speech is synthetic, with the id of the session as that of the request.
    """
    rate = fields.get("sample_rate") or default_rate(audio_format)
    encoder: Encoder | None = None
    config = {**fields, "type": "session.config", "response_format": "pcm", "sample_rate": 24_000}
    with _socket(client) as socket:
        socket.send(json.dumps(config))
        writer = _Writer(socket, source)
        for message in _messages(socket):
            if isinstance(message, bytes):
                target.write(encoder.feed(message) if encoder else b"")
                target.flush()
            elif (kind := (told := json.loads(message)).get("type")) == "session.configured":
                label = _label_of(told) if labelled else None
                encoder = Encoder(audio_format, sample_rate=rate, streaming=streaming, provenance=label)
                writer.start()
            elif kind == "input.committed":
                writer.room.release()
            elif kind == "error":
                raise ClientError(told["message"])
    if writer.error is not None:
        raise writer.error
    if encoder is None:
        raise ClientError("the service has ended the session before it began")
    target.write(encoder.finish())


def _label_of(configured: Mapping[str, Any]) -> Provenance:
    return Provenance(model=configured["model"], request_id=configured["session_id"], made_at=datetime.now(UTC))


def _socket(client: Client) -> ClientConnection:
    url = client.url.replace("http", "ws", 1) + "/v1/audio/speech/stream"
    headers = {"Authorization": client.authorization} if client.authorization else None
    try:
        return connect(
            url,
            additional_headers=headers,
            proxy=None if is_local(client.url) else True,
            ssl=client.tls if url.startswith("wss:") else None,
            max_size=None,
        )
    except websockets.InvalidStatus as error:
        raise ClientError(message_of(error.response.status_code, bytes(error.response.body or b""))) from None
    except (websockets.InvalidURI, websockets.InvalidHandshake, websockets.InvalidMessage) as error:
        raise ClientError(f"{client.url} does not take a WebSocket: {error}") from None
    except TimeoutError as error:
        raise ClientError(f"{client.url} does not answer: {error}") from None
    except OSError as error:
        raise unreachable(client.url, error) from None


def _messages(socket: ClientConnection) -> Iterator[str | bytes]:
    """The service's messages, up to a normal end."""
    try:
        while True:
            yield socket.recv()
    except websockets.ConnectionClosed as closed:
        if closed.rcvd and closed.rcvd.code == CloseCode.NORMAL_CLOSURE:
            return
        # A service that stops closes an idle socket without an error, and the rest of the text is not spoken.
        reason = closed.rcvd.reason if closed.rcvd else ""
        raise ClientError(f"the service ended the speech: {reason or 'the connection broke off'}") from None


class _Writer:
    """Sends what comes from `source`, in a thread of its own. `room` are the utterances that may still be sent."""

    def __init__(self, socket: ClientConnection, source: int) -> None:
        self.room = threading.Semaphore(_WAITING)
        self.error: ClientError | None = None
        self._socket = socket
        self._source = source
        self._length = 0
        """Characters of the utterance under way."""
        self._blank = True
        """No text was sent that has more than white space."""

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._run, name="stdin", daemon=True).start()

    def _run(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while piece := self._read():
                self._write(decoder.decode(piece))
            self._write(decoder.decode(b"", final=True))
            if self._blank:  # a program that failed wrote it; an empty file of speech must not replace a good one
                self._fail("stdin has no text to speak")
                return
            self._commit()
            self._socket.send(json.dumps({"type": "session.close"}))
        except websockets.ConnectionClosed:
            pass  # the reader of the socket sees why
        except (UnicodeDecodeError, OSError) as error:
            self._fail(f"stdin is not text: {error}")

    def _fail(self, problem: str) -> None:
        self.error = ClientError(problem)
        self._socket.close()

    def _read(self) -> bytes:
        """The next bytes; b"" at the end. On a terminal each line is an utterance."""
        if os.isatty(self._source) or not select.select([self._source], [], [], QUIET_S)[0]:
            self._commit()
        return os.read(self._source, _PIECE_BYTES)

    def _write(self, text: str) -> None:
        for start in range(0, len(text), _UTTERANCE_CHARS):
            piece = text[start : start + _UTTERANCE_CHARS]
            length = self._length + len(piece)
            end = end_of_last_sentence(piece) if length > _UTTERANCE_CHARS else 0
            if not end and length > _LONGEST_UTTERANCE_CHARS:
                end = piece.rfind(" ") + 1 or len(piece)
            if end:
                self._send(piece[:end])
                self._commit()
            self._send(piece[end:])

    def _send(self, text: str) -> None:
        if text:
            self._socket.send(json.dumps({"type": "input.text", "text": text}))
            self._length += len(text)
            self._blank = self._blank and not text.strip()

    def _commit(self) -> None:
        if self._length:
            self.room.acquire()
            self._socket.send(json.dumps({"type": "input.commit"}))
            self._length = 0
