"""The model runner: batch sizes, padding, and how the model's functions run: traced on CPU, CUDA graphs on a GPU.

Owns the buckets, the inputs of prefills, and what was traced or captured. It decides nothing about requests.
The arithmetic is Qwen3TTSModel's, one code path for both runners.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.model_config import Shape
from gpu_worker.engines.qwen.chunk_schedule import CHUNK_LENGTHS
from gpu_worker.engines.qwen.model.prompt import Prompt
from gpu_worker.engines.qwen.model.qwen3_tts import Qwen3TTSModel
from gpu_worker.engines.qwen.prefix_cache import PrefixCache
from gpu_worker.engines.qwen.runtime.captured_buckets import (
    BATCH_SIZES,
    DECODE_BATCH_SIZES,
    CapturedBuckets,
    largest_first,
    padded,
    smallest_bucket,
)
from gpu_worker.engines.qwen.runtime.cpu_traces import NODE_BYTES, CpuTraces, Function, Run, run_untraced
from gpu_worker.engines.qwen.runtime.cuda_graphs import Key
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from gpu_worker.engines.qwen.runtime.products import BATCH_MULTIPLE
from gpu_worker.engines.qwen.runtime.transfers import to_device

SlotLengths = Sequence[tuple[int, int]]
"""(slot, cached tokens that it reads) of each slot whose result matters."""

KV_LENGTHS: Final = (256, 512, 1024, 2048, 4096, 8192)
"""Lengths of the KV cache that decode steps are captured for if attention does not read each row's own length.

A step then reads at most twice what its longest row needs.
"""

PREFILL_BATCH_SIZES: Final = (1, 4)
"""Numbers of prompts that prefills are captured for."""

PREFILL_LENGTHS: Final = (16, 32, 64, 128, 256)
"""Prompt lengths that prefills are captured for. Longer prompts run eagerly, padded to a power of 2."""

GRAPH_NODE_BYTES: Final = 10 << 10
"""The driver's memory for a kernel in a graph: about 10 KB, reported for CUDA 12 (NVIDIA/cccl 3768)."""

GRAPH_NODES: Final = {"frame": 900, "decode": 240, "prefill": 300}
"""Kernels of a decode step, of a vocoder's call and of a prefill of published models: see test_fake_cuda.py.

With TTS_KERNELS=torch they are twice as many. SLOTS_SHARE leaves room for those, too.
"""

TRACE_NODES: Final = 55
"""Nodes of a trace for each layer and forward of the code predictor: 53 in float32, 71 in bfloat16."""

SHARED_FORWARDS: Final = 2
"""Forwards of a large code predictor that are traced: the first one, which reads two tokens, and one for all others."""


class PrefillInput(msgspec.Struct, frozen=True):
    """A prompt to read into a slot. `full_vocab`: see SamplingParams."""

    slot: int
    prompt: Prompt
    full_vocab: bool


class ModelRunner(Protocol):
    """Runs prefills and decode steps on the device. On CUDA the methods return before the device is done.

    `prefixes`: what is kept of prompts; None if each is read whole.
    """

    prefixes: PrefixCache | None

    def prefill(self, inputs: Sequence[PrefillInput]) -> None:
        """Read prompts into their slots."""

    def decode_step(self, slot_lengths: SlotLengths, *, full_vocab: bool) -> bool:
        """Make one frame for each slot of `slot_lengths`: (slot, tokens in its cache once the frame is read).

        `full_vocab`: whether the sampling parameters of any of them need the full vocabulary.
        Returns True if every function that can be traced or captured was.
        """

    def prepare(self) -> None:
        """Trace or capture the model's functions, so that the first frames are not late."""

    def release(self) -> None:
        """Free everything that refers to device memory; `prepare` makes it again."""

    def close(self) -> None:
        """Free everything for good."""

    def memory(self) -> dict[str, int]:
        """Device bytes that `close` frees, by purpose."""


def rows_needed(slots: int, device: torch.device) -> int:
    """Rows of state and cache for `slots` requests: on CUDA, those of a captured batch size and one for padding."""
    if device.type == "cuda":
        return smallest_bucket(slots, BATCH_SIZES) + 1
    return slots


def cpu_batch_sizes(slots: int) -> list[int]:
    """Batch sizes that a CPU computes: 1, all slots, and the multiples to which products are padded anyway."""
    return [n for n in range(1, slots + 1) if n in {1, slots} or n % BATCH_MULTIPLE == 0]


def trace_bytes(shape: Shape, slots: int, *, large: bool) -> int:
    """An estimate of the host memory of a CPU's traces of the code predictor. `large`: see CpuModelRunner."""
    forwards = SHARED_FORWARDS if large else shape.num_code_groups - 1
    return NODE_BYTES * TRACE_NODES * forwards * shape.num_hidden_layers * len(cpu_batch_sizes(slots))


def graph_bytes(slots: int) -> int:
    """An estimate of what the driver takes for the graphs of an engine, besides the memory that they compute in."""
    frames = sum(size <= slots for size in BATCH_SIZES)
    decodes = sum(size <= slots for size in DECODE_BATCH_SIZES) * len(CHUNK_LENGTHS)
    prefills = len(PREFILL_BATCH_SIZES) * len(PREFILL_LENGTHS)
    nodes = GRAPH_NODES
    return GRAPH_NODE_BYTES * (frames * nodes["frame"] + decodes * nodes["decode"] + prefills * nodes["prefill"])


class CpuModelRunner:
    """Calls the model's functions as they are, but traces the code predictor's, whose shapes the batch size fixes.

    Products are batch invariant (products.BATCH_MULTIPLE), so idle rows may fill a batch up to one of a few sizes.
    Where a row of a product needs no other rows for its bits, the constant beginnings of prompts are computed once:
    a prompt is then read to the same bits in one piece and behind its beginning. A GPU reads a whole one in a few ms.
    """

    def __init__(self, model: Qwen3TTSModel) -> None:
        self._model = model
        state, predictor = model.state, model.code_predictor
        self._batch_sizes = cpu_batch_sizes(len(state.frame))
        self._prepared: set[int] = set()
        # Where every product is small, threads that share one cost more than they save:
        # with two, a frame of one stream took 4.3 ms instead of 3.3, and one of 16 streams 7.5 instead of 7.1.
        large = predictor.stack.products.weights or any(tensor.is_mkldnn for tensor in predictor.tensors())
        self._single_thread = not large
        independent = model.talker.stack.products.row_multiple == 1
        self.prefixes = PrefixCache(model.talker.cache) if independent else None
        held = (model.codec_table, model.table_offsets)
        self._traces = CpuTraces(lambda: (*held, *state.tensors(), *predictor.tensors(), *predictor.scratch()))

    def prefill(self, inputs: Sequence[PrefillInput]) -> None:
        """Read one prompt at a time at its own length: nothing is padded."""
        for one in inputs:
            embeds = one.prompt.embeds
            device = embeds.device
            slot, length = (torch.tensor([number], device=device) for number in (one.slot, len(embeds)))
            prefixes = self.prefixes if one.prompt.constant else None
            prefix = embeds[: 0 if prefixes is None else one.prompt.constant]
            key = b"" if prefixes is None else prefixes.key(prefix)
            cached = prefixes is not None and prefixes.load(one.slot, key)
            self._model.prefill(
                embeds[None], slot, length, full_vocab=one.full_vocab, prefix=len(prefix), cached=cached
            )
            if prefixes is not None and not cached:
                prefixes.keep(one.slot, key, len(prefix))

    def decode_step(self, slot_lengths: SlotLengths, *, full_vocab: bool) -> bool:
        batch = max(slot for slot, _ in slot_lengths) + 1
        padded_batch = smallest_bucket(batch, self._batch_sizes)
        threads = torch.get_num_threads()
        if self._single_thread:
            torch.set_num_threads(1)
        untraced = self._traces.untraced_runs
        try:
            self._code_predictor_step(padded_batch, self._run(padded_batch))
        finally:
            torch.set_num_threads(threads)
        self._talker_step(batch, self._run(batch), full_vocab=full_vocab)
        return self._traces.untraced_runs == untraced

    def prepare(self) -> None:
        for batch in self._batch_sizes:
            if batch not in self._prepared:
                run = _once(self._run(batch))  # no row is active yet, so no result is kept
                self._code_predictor_step(batch, run)
                if not self._single_thread:
                    self._talker_step(batch, run, full_vocab=False)
                self._prepared.add(batch)

    def _code_predictor_step(self, batch: int, run: Run) -> None:
        """Run the trace of the whole step if it is small, else those of its parts, by `run`.

        A trace of all forwards of a large model takes 20 MB for each batch size, and 1.5 s of CPU time.
        Calling the parts costs 0.5 ms a frame, which is a tenth of a small one.
        """
        step = self._model.code_predictor_step
        if self._single_thread:
            self._traces.run((batch, "frame"), functools.partial(step, batch))
        else:
            step(batch, run)

    def _talker_step(self, batch: int, run: Run, *, full_vocab: bool) -> None:
        """Run the step with a trace of what is between the attention of two layers, by `run`, if it is large.

        One trace serves all layers. It saves a quarter of the time that goes into the talker's small operators.
        """
        traced = not self._single_thread and batch in self._batch_sizes
        run = run if traced else run_untraced
        self._model.talker_step(batch, 0, full_vocab=full_vocab, run=run)

    def _run(self, batch: int) -> Run:
        def run(name: str, function: Function, *arguments: Tensor, varied: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
            return self._traces.run((batch, name), function, *arguments, varied=varied)

        return run

    def release(self) -> None:
        """Free the prefixes. Weights stay where they are, so the traces stay valid."""
        if self.prefixes is not None:
            self.prefixes.clear()

    def close(self) -> None:
        self.release()
        self._traces.clear()
        self._prepared.clear()
        self._model.code_predictor.release_scratch()

    def memory(self) -> dict[str, int]:
        memory = {"graphs": self._traces.bytes, "workspace": self._model.code_predictor.scratch_bytes}
        return memory if self.prefixes is None else {**memory, "prefixes": self.prefixes.bytes}


def _once(run: Run) -> Run:
    """Run each function once, and give the other layers and codebooks that share its trace copies of its result.

    A load needs the traces, but no result: half a second of CPU time less for a published model in int8.
    """
    results: dict[str, tuple[Tensor, ...]] = {}

    def once(name: str, function: Function, *arguments: Tensor, varied: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        if name not in results:
            results[name] = run(name, function, *arguments, varied=varied)
        return tuple(result.clone() for result in results[name])  # a trace tells its arguments apart by their identity

    return once


class CudaGraphModelRunner:
    """Replays graphs by batch size and length.

    float32 is the dtype in which a seed gives the same speech in any batch. As kernels chosen by size round
    differently, float32 has one batch size and one KV length, and reads prompts one at a time.
    """

    prefixes: PrefixCache | None = None

    def __init__(self, model: Qwen3TTSModel, streams: CudaStreams) -> None:
        """The model's rows are those of `rows_needed`: the last one is for padding."""
        batch_invariant = model.codec_table.dtype == torch.float32
        largest = self._padding_slot = len(model.state.frame) - 1
        max_model_len = model.talker.cache.max_model_len
        self._model = model
        self._streams = streams
        self._batch_sizes = [largest] if batch_invariant else [size for size in BATCH_SIZES if size <= largest]
        one_length = batch_invariant or model.talker.cache.reads_lengths
        shorter = [] if one_length else [length for length in KV_LENGTHS if length < max_model_len]
        self._kv_lengths = [*shorter, max_model_len]
        self._prefill_batch_sizes = [1] if batch_invariant else [n for n in PREFILL_BATCH_SIZES if n <= largest]
        self._prefill_lengths = [length for length in PREFILL_LENGTHS if length < max_model_len]
        self._buckets = CapturedBuckets()

    def prefill(self, inputs: Sequence[PrefillInput]) -> None:
        """Read prompts whose lengths fall into the same bucket together."""
        groups: dict[int, list[PrefillInput]] = {}
        for one in inputs:
            groups.setdefault(self._padded_length(len(one.prompt.embeds)), []).append(one)
        largest = self._prefill_batch_sizes[-1]
        for length, group in groups.items():
            for start in range(0, len(group), largest):
                self._prefill(group[start : start + largest], length)

    def decode_step(self, slot_lengths: SlotLengths, *, full_vocab: bool) -> bool:
        batch = smallest_bucket(max(slot for slot, _ in slot_lengths) + 1, self._batch_sizes)
        kv_len = smallest_bucket(max(length for _, length in slot_lengths), self._kv_lengths)
        model = self._model
        code_predictor_step = functools.partial(model.code_predictor_step, batch)
        predicted = self._buckets.run(("code_predictor_step", batch, 0), code_predictor_step)
        talker_step = functools.partial(model.talker_step, batch, kv_len, full_vocab=full_vocab)
        return self._buckets.run(("talker_step", batch, kv_len), talker_step) and predicted

    def prepare(self) -> None:
        model, streams = self._model, self._streams
        model.state.active.fill_(False)
        functions: dict[Key, Callable[[], None]] = {}
        for batch in self._batch_sizes:
            model.code_predictor.allocate_scratch(batch)  # in a capture it would become part of the graphs' memory
        for batch, kv_len in largest_first(self._batch_sizes, self._kv_lengths):
            step = functools.partial(model.code_predictor_step, batch)
            functions.setdefault(("code_predictor_step", batch, 0), step)
            step = functools.partial(model.talker_step, batch, kv_len, full_vocab=False)
            functions["talker_step", batch, kv_len] = step
        for batch, length in largest_first(self._prefill_batch_sizes, self._prefill_lengths):
            bucket = ("prefill", batch, length)
            embeds, where = self._buckets.inputs[bucket] = self._new_inputs(batch, length)
            functions[bucket] = functools.partial(model.prefill, embeds, *where, full_vocab=False)
        self._buckets.capture(
            functions, capturing=streams.frame_capture, warming=streams.transfer, pool=streams.frame_pool
        )

    def release(self) -> None:
        self._buckets.release()
        self._model.code_predictor.release_scratch()

    def close(self) -> None:
        self.release()

    def memory(self) -> dict[str, int]:
        memory = self._buckets.memory()
        memory["workspace"] += self._model.code_predictor.scratch_bytes
        return memory

    def _prefill(self, group: Sequence[PrefillInput], length: int) -> None:
        batch = smallest_bucket(len(group), self._prefill_batch_sizes)
        bucket = ("prefill", batch, length)
        embeds, where = self._buckets.inputs.get(bucket) or self._new_inputs(batch, length)
        for row, one in enumerate(group):
            embeds[row, : len(one.prompt.embeds)] = one.prompt.embeds
        slots, lengths = ([one.slot for one in group], [len(one.prompt.embeds) for one in group])
        numbers = [*padded(slots, batch, self._padding_slot), *padded(lengths, batch, 1)]
        where.copy_(to_device(numbers, where.device).view(2, batch), non_blocking=True)
        full_vocab = any(one.full_vocab for one in group)
        self._buckets.run(bucket, functools.partial(self._model.prefill, embeds, *where, full_vocab=full_vocab))

    def _new_inputs(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Embeddings [batch, length, hidden]; slots and prompt lengths, int64 [2, batch], all of them padding."""
        table = self._model.codec_table
        where = torch.full((2, batch), self._padding_slot, dtype=torch.int64, device=table.device)
        where[1] = 1
        return table.new_zeros(batch, length, table.shape[1]), where

    def _padded_length(self, tokens: int) -> int:
        power_of_2 = 1 << (tokens - 1).bit_length()
        return smallest_bucket(tokens, [*self._prefill_lengths, min(power_of_2, self._kv_lengths[-1])])
