"""Frames between their launch on the device and the host's look at their codes.

LaunchedFrames launches a frame, counts it as speech when it is ready, and knows when the next one has to be launched.
Which jobs take part in a frame, the engine decides.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import torch

from gpu_worker.engines.qwen.model.slot_state import SlotState
from gpu_worker.engines.qwen.runner import ModelRunner
from gpu_worker.engines.qwen.runtime.transfers import HostCopy
from gpu_worker.engines.qwen.sequence import RunningJob
from gpu_worker.engines.qwen.vocoder import Vocoder

LAUNCH_MARGIN_S: Final = 2e-3
"""A frame is launched this long before the frame on the device can be done, so the device does not run dry.

The host needs 0.2 to 2 ms for a launch. If it were launched at once, the frame would stand before the prompts of all
that come in the meantime: 8 ms of first audio at the median of a busy engine, on the clock of test_latency.py.
"""

FRAME_TIMES: Final = 16
"""Of this many last frames the shortest time is taken for that of the frame on the device."""


class LaunchedFrame(msgspec.Struct, frozen=True):
    """A frame on the device: its jobs, each with the number of its utterance and the slot that it had then.

    Of the `early` ones only the codes are made: their text has not come. The same frame is made again when it has.
    """

    members: list[tuple[RunningJob, int, int]]
    early: list[tuple[RunningJob, int]]


class LaunchedFrames:
    """The frames on the device, the oldest first."""

    def __init__(self, state: SlotState, runner: ModelRunner, vocoder: Vocoder, clock: Callable[[], float]) -> None:
        """`clock` returns seconds."""
        self._state = state
        self._runner = runner
        self._vocoder = vocoder
        self._clock = clock
        self._cuda = state.active.is_cuda
        self._frames: deque[HostCopy[LaunchedFrame]] = deque()
        self._frame_started = -math.inf
        self._frame_times: deque[float] = deque(maxlen=FRAME_TIMES)
        self._active_slots: set[int] = set()
        self.batch_sizes: Counter[int] = Counter()
        """Frames, by the number of their jobs."""
        self.steps: Counter[bool] = Counter()
        """Decode steps, by whether they were captured."""

    def __len__(self) -> int:
        return len(self._frames)

    def launch(self, members: Sequence[RunningJob], early: Sequence[RunningJob] = ()) -> None:
        """Start a frame of `members` on the device. Of the `early` ones it makes the codes, but keeps no state."""
        self._set_active_slots({sequence.slot for sequence in members})
        batch = (*members, *early)
        rows = [(sequence.slot, sequence.prompt_tokens + sequence.frames_launched + 1) for sequence in batch]
        frame = LaunchedFrame(
            [(sequence, sequence.utterance, sequence.slot) for sequence in members],
            [(sequence, sequence.utterance) for sequence in early],
        )
        host_copy = HostCopy(self._state.next_codebook0, frame)
        self._vocoder.wait_for_older_decodes()
        full_vocab = any(member.plan.sampling.full_vocab for member in batch)
        captured = self._runner.decode_step(rows, full_vocab=full_vocab)
        host_copy.start()
        self.steps[captured] += 1
        self.batch_sizes[len(members)] += 1
        if not self._frames:
            self._frame_started = self._clock()
        self._frames.append(host_copy)
        for sequence in members:
            sequence.frames_launched += 1
        for sequence in early:
            sequence.early_launched = True

    def launch_due(self) -> bool:
        """True if the device would be without a frame before long."""
        if not self._frames or not self._cuda:
            return True
        shortest = min(self._frame_times, default=0.0)
        return len(self._frames) == 1 and self._clock() >= self._frame_started + shortest - LAUNCH_MARGIN_S

    def oldest_ready(self) -> bool:
        """True if `read_oldest` returns at once."""
        return self._frames[0].ready()

    def read_oldest(self) -> None:
        """Count the oldest frame as speech. The codes made with it, those of codebook 0 of the next, may be the end."""
        host_copy = self._frames[0]
        next_codes = host_copy.wait().tolist()
        now = self._clock()
        self._frame_times.append(now - self._frame_started)
        self._frame_started = now
        for sequence, utterance, slot in host_copy.record.members:
            if sequence.alive and sequence.utterance == utterance and not sequence.ended:
                sequence.on_frame_ready(last=next_codes[slot] == self._state.eos_code)
        for sequence, utterance in host_copy.record.early:
            if sequence.alive and sequence.utterance == utterance and not sequence.ended:
                sequence.on_early_frame_ready()
        self._frames.popleft()

    def clear(self) -> None:
        """Forget all frames. The device may still compute them."""
        self._frames.clear()

    def forget_active_slots(self) -> None:
        """The slots' state on the device is new: write its mask with the next frame."""
        self._active_slots.clear()

    def reset_statistics(self) -> None:
        """Forget the times and the numbers of all frames."""
        self._frame_times.clear()
        self.steps.clear()
        self.batch_sizes.clear()

    def _set_active_slots(self, slots: set[int]) -> None:
        if slots == self._active_slots:
            return
        active = self._state.active
        mask = torch.zeros(active.shape, dtype=torch.bool, pin_memory=self._cuda)
        mask[sorted(slots)] = True
        active.copy_(mask, non_blocking=True)
        self._active_slots = slots
