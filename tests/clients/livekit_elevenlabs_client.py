"""LiveKit's ElevenLabs plugin says a text that comes in words: a line at the first audio, then JSON with all of it.

Arguments: the service's URL, the model and the text. It runs in the environment of the clients.
"""

import asyncio
import base64
import json
import sys

import aiohttp
from livekit.agents import APIConnectOptions, APIError
from livekit.plugins import elevenlabs


async def main(url: str, model: str, text: str) -> None:
    """Say `text` as an agent does whose language model writes it."""
    pcm, rate, error = b"", 0, ""
    async with aiohttp.ClientSession() as session:
        options = {"base_url": f"{url}/v1", "api_key": "none", "voice_id": "alloy", "model": model}
        speech = elevenlabs.TTS(**options, http_session=session)
        try:
            # Without a retry, which would say all of it once the service is back.
            async with speech.stream(conn_options=APIConnectOptions(max_retry=0)) as stream:
                for word in text.split(" "):
                    stream.push_text(word + " ")
                stream.end_input()
                async for event in stream:
                    if not pcm:
                        print("speaking", flush=True)  # noqa: T201 -- the test waits for it
                    pcm += bytes(event.frame.data)
                    rate = event.frame.sample_rate
        except APIError as failed:
            error = repr(failed)
        await speech.aclose()
    print(json.dumps({"pcm": base64.b64encode(pcm).decode(), "rate": rate, "error": error}))  # noqa: T201


asyncio.run(main(*sys.argv[1:]))
