"""A Wyoming client, as Home Assistant is one: a line at the first audio, then a line of JSON with voices and audio.

Arguments: the port of the Wyoming server, the text, and "streamed" to send the text as it is written.
It runs in the environment of wyoming-openai.
"""

import asyncio
import base64
import json
import sys

from wyoming.audio import AudioChunk, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.info import Describe, Info
from wyoming.tts import (
    Synthesize,
    SynthesizeChunk,
    SynthesizeStart,
    SynthesizeStop,
    SynthesizeStopped,
    SynthesizeVoice,
)


async def main(port: str, text: str, form: str = "whole") -> None:
    """Ask for the voices, then say `text`."""
    async with AsyncTcpClient("127.0.0.1", int(port)) as server:
        await server.write_event(Describe().event())
        info = Info.from_event(await server.read_event())
        voices = [offered.name for program in info.tts for offered in program.voices]
        voice = SynthesizeVoice(name=voices[0])
        if form == "streamed":
            for request in (SynthesizeStart(voice=voice), SynthesizeChunk(text=text), SynthesizeStop()):
                await server.write_event(request.event())
        else:
            await server.write_event(Synthesize(text=text, voice=voice).event())
        last = SynthesizeStopped if form == "streamed" else AudioStop
        pcm, rate, error = b"", 0, ""
        while not error:
            event = await server.read_event()
            if event is None or Error.is_type(event.type):
                error = Error.from_event(event).text if event else "the connection is closed"
            elif AudioChunk.is_type(event.type):
                chunk = AudioChunk.from_event(event)
                if not pcm:
                    print("speaking", flush=True)  # noqa: T201 -- the test waits for it
                pcm += chunk.audio
                rate = chunk.rate
            elif last.is_type(event.type):
                break
    heard = {"voices": voices, "pcm": base64.b64encode(pcm).decode(), "rate": rate, "error": error}
    print(json.dumps(heard))  # noqa: T201


asyncio.run(main(*sys.argv[1:]))
