"""The CUDA streams, and the memory pools of graphs, that all engines of a process share. Each is created once and kept.

torch reuses a pool of 32 streams per priority, so streams of each engine's own would collide after a few loads.
A collision is an error: a thread has one cuBLAS workspace a stream, and graphs captured on one stream share it.
Hence three rules:

- Graphs captured on one stream never run at the same time.
  Those of `frame_capture` are replayed on the default stream, those of `codec_capture` on `codec`, one after the other.
- On a capture stream nothing runs but captures, and the products that allocate its workspace before the first one.
  A warm-up there would write into the workspace that a replayed graph is using.
- Each capture stream is alone in its priority: work on a stream shared with a capture would be captured.
"""

import functools
from typing import Final

import torch
from torch.nn import functional

from gpu_worker.engines.qwen.runtime.cuda_graphs import GraphPool

_FRAME_PRIORITY: Final = -2
_CODEC_PRIORITY: Final = -1
"""Kernels of a graph have the priority of the stream that it was captured on. A frame is 2500 small kernels:
without precedence each of them would wait for a decode's large ones. All other work comes behind both.
"""


class CudaStreams:
    """Creates each stream at its first use.

    Use it first in the thread that opens and moves engines: cuBLAS workspaces belong to a thread.
    """

    @functools.cached_property
    def transfer(self) -> torch.cuda.Stream:
        """The stream on which models are loaded, moved and warmed up while others run."""
        return torch.cuda.Stream()

    @functools.cached_property
    def codec(self) -> torch.cuda.Stream:
        """The stream on which every engine's vocoder decodes, beside the decode steps on the default stream."""
        return torch.cuda.Stream()

    @functools.cached_property
    def encode(self) -> torch.cuda.Stream:
        """The stream on which recordings are encoded. All engines share it: memory freed on a stream stays with it."""
        return torch.cuda.Stream()

    @functools.cached_property
    def frame_capture(self) -> torch.cuda.Stream:
        """The stream on which the graphs of prefills and decode steps are captured."""
        return _capture_stream(_FRAME_PRIORITY)

    @functools.cached_property
    def codec_capture(self) -> torch.cuda.Stream:
        """The stream on which the graphs of the codec are captured."""
        return _capture_stream(_CODEC_PRIORITY)

    @functools.cached_property
    def frame_pool(self) -> GraphPool:
        """The memory of the graphs of `frame_capture`."""
        return GraphPool()

    @functools.cached_property
    def codec_pool(self) -> GraphPool:
        """The memory of the graphs of `codec_capture`."""
        return GraphPool()


def _capture_stream(priority: int) -> torch.cuda.Stream:
    stream = torch.cuda.Stream(priority=priority)
    _allocate_workspace(stream)
    return stream


def _allocate_workspace(stream: torch.cuda.Stream) -> None:
    """Give `stream` its workspaces: a workspace allocated during a capture would lie in that capture's pool."""
    with torch.cuda.stream(stream):
        some = torch.ones(64, 64, device="cuda")
        torch.mm(some, some)
        functional.linear(some, some, some[0])
    stream.synchronize()
