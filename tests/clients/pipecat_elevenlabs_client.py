"""Pipecat's ElevenLabsTTSService says a text in a pipeline: a line at the first audio, then JSON with all of it.

Arguments: the service's URL, the model and the text. It runs in the environment of the clients.
"""

import asyncio
import base64
import json
import sys

from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    Frame,
    LLMFullResponseEndFrame,
    LLMFullResponseStartFrame,
    LLMTextFrame,
    TTSAudioRawFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.elevenlabs.tts import ElevenLabsTTSService
from pipecat.workers.runner import WorkerRunner


class Listener(FrameProcessor):
    """The end of the pipeline: it keeps the audio."""

    def __init__(self) -> None:
        super().__init__()
        self.pcm = b""
        self.rate = 0

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Keep the frame's audio, and pass the frame on."""
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            if not self.pcm:
                print("speaking", flush=True)  # noqa: T201 -- the test waits for it
            self.pcm += frame.audio
            self.rate = frame.sample_rate
        await self.push_frame(frame, direction)


async def main(url: str, model: str, text: str) -> None:
    """Say `text` as a bot does whose language model writes it."""
    settings = ElevenLabsTTSService.Settings(model=model, voice="alloy")
    # By default, it opens another socket without a word.
    socket = {"url": url.replace("http", "ws", 1), "reconnect_on_error": False}
    speech = ElevenLabsTTSService(api_key="none", settings=settings, **socket)
    listener = Listener()
    worker = PipelineWorker(Pipeline([speech, listener]))
    errors = []

    @worker.event_handler("on_pipeline_error")
    async def _failed(_worker: PipelineWorker, frame: ErrorFrame) -> None:
        errors.append(frame.error)

    words = [LLMTextFrame(word + " ") for word in text.split(" ")]
    await worker.queue_frames([LLMFullResponseStartFrame(), *words, LLMFullResponseEndFrame(), EndFrame()])
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    await runner.run()
    heard = {"pcm": base64.b64encode(listener.pcm).decode(), "rate": listener.rate, "error": "; ".join(errors)}
    print(json.dumps(heard))  # noqa: T201


asyncio.run(main(*sys.argv[1:]))
