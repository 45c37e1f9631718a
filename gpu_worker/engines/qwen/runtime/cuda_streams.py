"""The CUDA streams that all engines of a process share. Each is made once, and kept.

torch deals out 32 streams of each priority in turn: engines with streams of their own met on them after a few loads.
That must not be, since a thread has one cuBLAS workspace for each stream, and graphs recorded on a stream share it:

- Graphs recorded on one stream never run at the same time.
  Those of `frame_capture` are replayed on the default stream, those of `codec_capture` on `codec`, one after the other.
- On a recording stream nothing runs but the products that make its workspace, before anything is recorded there.
  A warm-up there would write into the workspace that some model's graph is just using.
- Work runs on streams of the other priority: on one shared with a recording, it would be recorded instead of done.
"""

import functools
from typing import Final

import torch
from torch.nn import functional

_RECORDING_PRIORITY: Final = -1


class CudaStreams:
    """Made where the first one is asked for, in the thread that opens and moves engines: workspaces are a thread's."""

    @functools.cached_property
    def transfer(self) -> torch.cuda.Stream:
        """Where models are loaded, moved and warmed up, beside those that speak."""
        return torch.cuda.Stream()

    @functools.cached_property
    def codec(self) -> torch.cuda.Stream:
        """Where every engine decodes, beside the frames."""
        return torch.cuda.Stream()

    @functools.cached_property
    def encode(self) -> torch.cuda.Stream:
        """Where recordings are encoded: memory freed on a stream is kept for that stream, so it is one for all."""
        return torch.cuda.Stream()

    @functools.cached_property
    def frame_capture(self) -> torch.cuda.Stream:
        """Where graphs of frames and prompts are recorded."""
        return _recording_stream()

    @functools.cached_property
    def codec_capture(self) -> torch.cuda.Stream:
        """Where graphs of the codec are recorded."""
        return _recording_stream()


def _recording_stream() -> torch.cuda.Stream:
    """A stream that has its workspace: one made during a recording would lie in that graph's pool, and keep it."""
    stream = torch.cuda.Stream(priority=_RECORDING_PRIORITY)
    with torch.cuda.stream(stream):
        some = torch.ones(64, 64, device="cuda")
        torch.mm(some, some)
        functional.linear(some, some, some[0])
    stream.synchronize()
    return stream
