"""Who runs the model's functions: on CPU as they are or traced, on CUDA as graphs captured at load.

It owns batch sizes and padding. It decides nothing about requests,
and the arithmetic is the Generator's: one code path, two executors.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.model_config import Shape
from gpu_worker.engines.qwen.model.kv_cache import SlotLengths
from gpu_worker.engines.qwen.model.layers import BATCH_MULTIPLE
from gpu_worker.engines.qwen.model.prompt import Prompt
from gpu_worker.engines.qwen.model.qwen3_tts import Qwen3TTSModel
from gpu_worker.engines.qwen.runtime.cpu_traces import NODE_BYTES, CpuTraces
from gpu_worker.engines.qwen.runtime.cuda_graphs import CudaGraphs, Key
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from gpu_worker.engines.qwen.runtime.transfers import to_device

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes that graphs are captured for."""

KV_LENGTHS: Final = (256, 512, 1024, 2048, 4096, 8192)
"""Cache lengths that graphs are captured for: a frame reads at most twice what it needs."""

PREFILL_BATCH_SIZES: Final = (1, 4)
"""Prompts read together in one captured prefill."""

PREFILL_LENGTHS: Final = (16, 32, 64, 128, 256)
"""Prompt lengths that prefill graphs are captured for; longer ones run uncaptured, at a length of a power of 2."""


TRACED_NODES: Final = 55
"""Nodes of a recording for each layer and forward of the code predictor: 47 to 49 in float32, 65 to 70 in bfloat16."""


class PrefillInput(msgspec.Struct, frozen=True):
    """A prompt on its way into a slot."""

    slot: int
    prompt: Prompt
    full_vocab: bool


class ModelRunner(Protocol):
    """Runs prefills and frames on the device; returns before they are done where the device allows it."""

    def prefill(self, entries: Sequence[PrefillInput]) -> None:
        """Read prompts into their slots."""
        ...

    def decode_step(self, rows: SlotLengths, *, full_vocab: bool) -> None:
        """One frame for `rows`: (slot, tokens in its cache once the frame is read)."""
        ...

    def prepare(self) -> None:
        """Do now what would make the first frames slow."""
        ...

    def release(self) -> None:
        """Forget everything that refers to device memory; `prepare` brings it back."""
        ...

    def close(self) -> None:
        """Forget everything for good."""
        ...

    def memory(self) -> dict[str, int]:
        """Device bytes that `close` frees, by purpose."""
        ...


def rows_needed(slots: int, device: torch.device) -> int:
    """Rows that the state must have for `slots` requests: batches of fixed sizes, and a row for padding, on CUDA."""
    if device.type == "cuda":
        return smallest_bucket(slots, BATCH_SIZES) + 1
    return slots


def cpu_batches(slots: int) -> list[int]:
    """Batch sizes that a CPU computes: one row alone, and what products are padded to anyway."""
    return [n for n in range(1, slots + 1) if n in {1, slots} or n % BATCH_MULTIPLE == 0]


def traced_bytes(shape: Shape, slots: int) -> int:
    """Host memory of a CPU's recordings of the code predictor, roughly."""
    forwards = (shape.num_code_groups - 1) * shape.num_hidden_layers
    return NODE_BYTES * TRACED_NODES * forwards * len(cpu_batches(slots))


class CpuModelRunner:
    """Calls the functions as they are, but traces the code predictor's, whose shapes a batch size fixes.

    A row's result does not depend on its company (see layers.BATCH_MULTIPLE),
    so rows that nobody waits for make up batches of few sizes.
    """

    def __init__(self, model: Qwen3TTSModel) -> None:
        self._model = model
        state, predictor = model.state, model.code_predictor
        self._batches = cpu_batches(len(state.frame))
        # Where every product is small, threads that share one cost more than they save:
        # with two, a frame of one stream took 4.3 ms instead of 3.3, and one of 16 streams 7.5 instead of 7.1.
        self._small = not any(tensor.is_mkldnn for tensor in predictor.tensors())
        self._traces = CpuTraces(lambda: (*state.tensors(), *predictor.tensors(), *predictor.scratch()))

    def prefill(self, entries: Sequence[PrefillInput]) -> None:
        """See Executor. One prompt at a time at its own length: nothing is padded."""
        for entry in entries:
            embeds = entry.prompt.embeds
            device = embeds.device
            slot, length = (torch.tensor([number], device=device) for number in (entry.slot, len(embeds)))
            self._model.prefill(embeds[None], slot, length, full_vocab=entry.full_vocab)

    def decode_step(self, rows: SlotLengths, *, full_vocab: bool) -> None:
        """See Executor."""
        used = max(slot for slot, _ in rows) + 1
        self._predict(used)
        self._model.talker_step(used, rows, kv_len=0, full_vocab=full_vocab)

    def prepare(self) -> None:
        """See Executor."""
        for batch in self._batches:
            self._traces.record(batch, functools.partial(self._model.code_predictor_step, batch))

    def release(self) -> None:
        """See Executor. Weights stay where they are, so what was recorded stays good."""

    def close(self) -> None:
        """See Executor."""
        self._traces.clear()
        self._model.code_predictor.release_scratch()

    def memory(self) -> dict[str, int]:
        """See Executor."""
        return {"graphs": self._traces.bytes, "workspace": self._model.code_predictor.scratch_bytes}

    def _predict(self, used: int) -> None:
        batch = smallest_bucket(used, self._batches)
        threads = torch.get_num_threads()
        if self._small:
            torch.set_num_threads(1)
        try:
            self._traces.run(batch, functools.partial(self._model.code_predictor_step, batch))
        finally:
            torch.set_num_threads(threads)


class CudaGraphModelRunner:
    """Replays graphs by batch size and cache length.

    In float32, the dtype in which a seed promises the same speech in any company, there is one batch size,
    one cache length, and prompts are read alone: kernels chosen by size round differently.
    """

    def __init__(
        self, model: Qwen3TTSModel, slots: int, max_model_len: int, streams: CudaStreams | None = None
    ) -> None:
        """`slots`: requests served at once; the row behind the largest batch size is there for padding."""
        exact = model.codec_table.dtype == torch.float32
        largest = smallest_bucket(slots, BATCH_SIZES)
        self._model = model
        self._batches = [largest] if exact else [size for size in BATCH_SIZES if size <= largest]
        self._reaches = [max_model_len] if exact else [*(r for r in KV_LENGTHS if r < max_model_len), max_model_len]
        self._prompts = [1] if exact else [size for size in PREFILL_BATCH_SIZES if size <= largest]
        self._tokens = [size for size in PREFILL_LENGTHS if size < max_model_len]
        self._max_model_len = max_model_len
        self._spare = largest
        self._streams = streams or CudaStreams()
        self._graphs = CudaGraphs()
        self._inputs: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def prefill(self, entries: Sequence[PrefillInput]) -> None:
        """See Executor. Prompts of one length bucket go together."""
        buckets: dict[tuple[int, bool], list[PrefillInput]] = {}
        for entry in entries:
            buckets.setdefault((self._token_bucket(len(entry.prompt.embeds)), entry.full_vocab), []).append(entry)
        for (tokens, full_vocab), group in buckets.items():
            step = self._prompts[-1]
            for start in range(0, len(group), step):
                self._prefill(group[start : start + step], tokens, full_vocab=full_vocab)

    def decode_step(self, rows: SlotLengths, *, full_vocab: bool) -> None:
        """See Executor."""
        used = smallest_bucket(max(slot for slot, _ in rows) + 1, self._batches)
        reach = smallest_bucket(max(length for _, length in rows), self._reaches)
        self._graphs.run(("code_predictor_step", used, 0), functools.partial(self._model.code_predictor_step, used))
        if full_vocab:  # rare: not worth a second set of graphs
            self._model.talker_step(used, (), reach, full_vocab=True)
        else:
            self._graphs.run(
                ("talker_step", used, reach),
                functools.partial(self._model.talker_step, used, (), reach, full_vocab=False),
            )

    def prepare(self) -> None:
        """Capture every graph, largest first, so that the smaller ones fit into the same memory."""
        model = self._model
        model.state.active.fill_(False)
        functions: dict[Key, Callable[[], None]] = {}
        for used in reversed(self._batches):
            functions["code_predictor_step", used, 0] = functools.partial(model.code_predictor_step, used)
            for reach in reversed(self._reaches):
                functions["talker_step", used, reach] = functools.partial(
                    model.talker_step, used, (), reach, full_vocab=False
                )
        for prompts in reversed(self._prompts):
            for tokens in reversed(self._tokens):
                inputs = self._inputs[prompts, tokens] = self._new_inputs(prompts, tokens)
                functions["prefill", prompts, tokens] = functools.partial(model.prefill, *inputs, full_vocab=False)
        self._graphs.capture(functions, recording=self._streams.frame_capture, warming=self._streams.transfer)

    def release(self) -> None:
        """See Executor."""
        self._graphs.clear()
        self._inputs.clear()
        self._model.code_predictor.release_scratch()

    def close(self) -> None:
        """See Executor."""
        self.release()

    def memory(self) -> dict[str, int]:
        """See Executor."""
        inputs = sum(tensor.nbytes for tensors in self._inputs.values() for tensor in tensors)
        return {"graphs": self._graphs.bytes, "workspace": inputs + self._model.code_predictor.scratch_bytes}

    def _prefill(self, group: Sequence[PrefillInput], tokens: int, *, full_vocab: bool) -> None:
        prompts = smallest_bucket(len(group), self._prompts)
        captured = self._inputs.get((prompts, tokens))
        embeds, slots, lengths = captured or self._new_inputs(prompts, tokens)
        for row, entry in enumerate(group):
            embeds[row, : len(entry.prompt.embeds)] = entry.prompt.embeds
        spare = prompts - len(group)
        where = [*(entry.slot for entry in group), *[self._spare] * spare]
        counts = [*(len(entry.prompt.embeds) for entry in group), *[1] * spare]
        for numbers, target in ((where, slots), (counts, lengths)):
            target.copy_(to_device(numbers, target.device), non_blocking=True)
        function = functools.partial(self._model.prefill, embeds, slots, lengths, full_vocab=full_vocab)
        if captured is None or full_vocab:
            function()
        else:
            self._graphs.run(("prefill", prompts, tokens), function)

    def _new_inputs(self, prompts: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        table = self._model.codec_table
        numbers = torch.full((2, prompts), self._spare, dtype=torch.int64, device=table.device)
        numbers[1] = 1
        return table.new_zeros(prompts, tokens, table.shape[1]), numbers[0], numbers[1]

    def _token_bucket(self, tokens: int) -> int:
        for size in self._tokens:
            if tokens <= size:
                return size
        return min(1 << (tokens - 1).bit_length(), self._max_model_len)


def smallest_bucket(number: int, sizes: Sequence[int]) -> int:
    """The smallest of ascending sizes that holds `number`."""
    for size in sizes:
        if number <= size:
            return size
    raise ValueError(f"{number} is more than the largest size, {sizes[-1]}")
