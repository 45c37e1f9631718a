"""From a checkpoint's directory to an engine that is ready to speak: the only place where its parts are wired.

Owns the choice of the dtype and of the number of slots. Importing it imports torch, so import it to open a model.
"""

import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import torch

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.model_config import (
    ModelConfig,
    TalkerShape,
    read_config,
    read_generation_config,
)
from gpu_worker.engines.qwen.checkpoint.tensor_files import TensorInfo, find_tensor_files, read_headers
from gpu_worker.engines.qwen.checkpoint.text_tokenizer import SharedTokenizers
from gpu_worker.engines.qwen.checkpoint.weights import open_weights
from gpu_worker.engines.qwen.chunk_schedule import MAX_CHUNK_FRAMES
from gpu_worker.engines.qwen.codec import Codec, stream_bytes
from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs
from gpu_worker.engines.qwen.engine import Parts, QwenEngine
from gpu_worker.engines.qwen.kernels.selection import KernelSetting, select_kernels
from gpu_worker.engines.qwen.model.attention import Backend, attention
from gpu_worker.engines.qwen.model.code_predictor import first_layer_inputs_bytes
from gpu_worker.engines.qwen.model.prompt import TEXT_EMBEDDING, PromptBuilder
from gpu_worker.engines.qwen.model.qwen3_tts import Qwen3TTSModel, product_shapes
from gpu_worker.engines.qwen.model.slot_state import MAX_TRAILING_TOKENS
from gpu_worker.engines.qwen.model.speaker_encoder import SpeakerEncoder
from gpu_worker.engines.qwen.offload import WeightOffloader
from gpu_worker.engines.qwen.planner import Planner
from gpu_worker.engines.qwen.prefix_cache import MAX_PREFIX_BYTES
from gpu_worker.engines.qwen.reference_cache import EncodedReference, ReferenceCache
from gpu_worker.engines.qwen.runner import (
    CpuModelRunner,
    CudaGraphModelRunner,
    ModelRunner,
    graph_bytes,
    rows_needed,
    trace_bytes,
)
from gpu_worker.engines.qwen.runtime.captured_buckets import BATCH_SIZES
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from gpu_worker.engines.qwen.runtime.products_trial import HALF, PLAIN, Quantization, are_large
from gpu_worker.engines.qwen.runtime.quantization import choose as choose_products
from gpu_worker.engines.qwen.runtime.quantization import widths
from gpu_worker.engines.qwen.vocoder import Vocoder

CPU_SLOTS: Final = 8
MAX_SLOTS: Final = 64
"""The most slots if none are configured: on CPU, and on CUDA."""

MAX_MODEL_LEN: Final = 2048
"""Tokens that a slot holds, prompt and frames: 112 KiB a token in bfloat16, over two minutes of speech."""

PREFIX_POSITIONS: Final = 144
"""Positions of prefixes that the estimate for a CPU counts: 16 preset voices have so many, within MAX_PREFIX_BYTES."""

SLOTS_SHARE: Final = 0.4
"""Share of the device memory left beside the weights that slots may take: graphs and other models need the rest."""

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Device = Literal["cuda", "cpu"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class QwenOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options with which engines are opened; one value serves all models of a process.

    `codecs` (speech tokenizers on the same device), `tokenizers` and `streams` are shared by all engines.
    `dtype` "auto": bfloat16 on CUDA, float32 on CPU. `slots` None: as many as fit.
    `trial_file` keeps which kernels are the fastest on this machine; None: each load tries them.
    `max_model_len`: tokens that a slot holds, prompt and frames.
    `pause_s`: silence between the utterances of a long text.
    `encoder_lock`: held while a reference recording is encoded. `reference_cache_bytes`: of encoded ones, an engine.
    `room` returns the bytes of the device that the budget leaves to this process; None: there is no budget.
    `cpu_budget_bytes`: of RAM, on a CPU, for all models; None: there is no budget.
    `wake` is called, from any thread, when an engine may have become runnable by itself: a recording is encoded.
    `interrupted` returns True if the caller of `step` has something else to do than to wait for the device.
    """

    codecs: SharedCodecs
    device: Device
    dtype: DtypeName = "auto"
    attention_backend: Backend = "auto"
    kernels: KernelSetting = "auto"
    quantization: Quantization = "none"
    trial_file: Path | None = None
    slots: int | None = None
    max_model_len: int = MAX_MODEL_LEN
    pause_s: float = 0.15
    reference_cache_bytes: int = 256 << 20
    encoder_lock: threading.Lock = msgspec.field(default_factory=threading.Lock)
    tokenizers: SharedTokenizers = msgspec.field(default_factory=SharedTokenizers)
    streams: CudaStreams = msgspec.field(default_factory=CudaStreams)
    room: Callable[[], int] | None = None
    cpu_budget_bytes: int | None = None
    wake: Callable[[], None] = lambda: None
    interrupted: Callable[[], bool] = lambda: False


def open_engine(directory: Path, options: QwenOptions) -> QwenEngine:
    """Load a verified checkpoint (see checkpoint.verification), ready to speak. Raises as `build_parts` does."""
    parts = build_parts(directory, options)
    run_ahead = options.device == "cuda"
    return QwenEngine(parts, pause_s=options.pause_s, run_ahead=run_ahead, interrupted=options.interrupted)


def build_parts(directory: Path, options: QwenOptions) -> Parts:
    """Load a verified checkpoint and build the parts of its engine, ready to speak.

    Raises:
        JobError: `model_unavailable` if the checkpoint or the options cannot be used;
            `insufficient_vram` if not even one slot fits beside the weights.
    """
    # float32 means float32: cuDNN would round the inputs of convolutions, and the codec's encoder choose other codes.
    torch.backends.cudnn.allow_tf32 = False
    # torch prefers cuDNN's attention on Hopper and newer devices. It makes a plan for every shape, once a thread:
    # 0.4 s a plan have been seen on a B200 with torch 2.11, and an engine has hundreds of shapes.
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)
    stream = options.streams.transfer if options.device == "cuda" else None
    with torch.inference_mode(), torch.cuda.stream(stream):
        codec = options.codecs.acquire(directory, quantized=options.quantization == "int8")
        try:
            parts = _build_parts(directory, codec, options)
        except BaseException:
            options.codecs.release(codec)
            raise
    if stream is not None:
        stream.synchronize()  # engines run on other streams
    return parts


def _build_parts(directory: Path, codec: Codec, options: QwenOptions) -> Parts:
    device, dtype = torch.device(options.device), compute_dtype(options.device, options.dtype)
    config, generation = read_config(directory), read_generation_config(directory)
    attend = attention(options.attention_backend, device, dtype)
    kernels = select_kernels(options.kernels, device, dtype)
    shapes = product_shapes(config.talker_config)
    products = choose_products(
        options.quantization, shapes, options.device, dtype, kernels=options.kernels, kept_in=options.trial_file
    )
    with open_weights(directory, "talker.", dtype=dtype, device=device) as weights:
        headers = read_headers(find_tensor_files(directory))
        size = weight_bytes(config.talker_config, headers, options.device, dtype, options.quantization)
        if options.slots is not None:
            slots = options.slots
        elif options.device == "cpu":
            slots = cpu_slots(directory, size, dtype, options.cpu_budget_bytes)
        else:
            slots = slots_that_fit(size, config, codec, options)
        model = Qwen3TTSModel(
            weights,
            config,
            generation,
            attend,
            kernels=kernels,
            slots=rows_needed(slots, device),
            max_model_len=options.max_model_len,
            products=products,
        )
        tokenizer = options.tokenizers.load(directory)
        prompts = PromptBuilder(
            weights,
            config,
            tokenizer,
            model.embed_codes,
            text_embedding=weights.as_stored(TEXT_EMBEDDING) if device.type == "cuda" else weights.rows(TEXT_EMBEDDING),
            codec_embedding=model.codec_table[: config.talker_config.vocab_size],
            products=HALF if device.type == "cpu" and products.quantization == "int8" else PLAIN,
            settled=tokenizer.settled,
        )
    vocoder = Vocoder(codec, model.state.ring_buffer, slots, options.streams)
    speaker = None
    if config.tts_model_type == "base":
        speaker = SpeakerEncoder(directory, dtype=dtype, device=device)
    runner: ModelRunner = CpuModelRunner(model)
    if device.type == "cuda":
        runner = CudaGraphModelRunner(model, options.streams)
    encode = _reference_encoder(directory, codec, speaker, options)
    parts = Parts(
        slots=slots,
        state=model.state,
        cache=model.talker.cache,
        runner=runner,
        prompts=prompts,
        planner=Planner(config, generation, prompts, max_model_len=options.max_model_len),
        vocoder=vocoder,
        reference_cache=ReferenceCache(encode, options.reference_cache_bytes, options.wake),
        offloader=WeightOffloader(
            [*model.tensors(), *prompts.tensors(), *(speaker.tensors() if speaker else ())],
            {
                "kv": list(model.talker.cache.tensors()),
                "state": list(model.state.tensors()),
                "codec_state": list(vocoder.tensors()),
            },
            device,
            hidden_bytes=model.all_hidden_bytes(),
            stream=options.streams.transfer if device.type == "cuda" else None,
            extra_memory=(runner.memory, vocoder.memory),
            on_close=lambda: options.codecs.release(codec),
        ),
    )
    runner.prepare()
    vocoder.prepare()
    return parts


def compute_dtype(device: Device, name: DtypeName, variable: str = "TTS_DTYPE") -> torch.dtype:
    """The dtype of weights and caches. `variable`: the setting to name.

    Raises:
        JobError: `model_unavailable` for float16 on CPU: torch's products in it need instructions that few CPUs have.
    """
    if device == "cpu" and name == "float16":
        raise JobError("model_unavailable", f"{variable}=float16 is for CUDA; a CPU computes in float32 or bfloat16")
    if name == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return DTYPES[name]


def codec_dtype(device: Device, model: DtypeName, codec: DtypeName = "auto") -> torch.dtype:
    """The dtype of the codec. "auto": that of the model, but float32 on a CPU without instructions for bfloat16.

    There torch converts at every operator: 363 ms a frame instead of 56, on an AMD EPYC (Zen 3) at published sizes.

    Raises:
        JobError: as compute_dtype.
    """
    if codec != "auto":
        return compute_dtype(device, codec, "TTS_CODEC_DTYPE")
    dtype = compute_dtype(device, model)
    if device == "cpu" and not torch.cpu._is_avx512_bf16_supported():  # noqa: SLF001 -- no public way
        return torch.float32
    return dtype


def slots_that_fit(weight_bytes: int, config: ModelConfig, codec: Codec, options: QwenOptions) -> int:
    """The number of slots on CUDA if none is configured. They take SLOTS_SHARE of what weights and graphs leave.

    `weight_bytes`: what the weights take on the device. Memory counts if it is free and within the budget.

    Raises:
        JobError: `insufficient_vram`, with the arithmetic, if not even one slot fits.
    """
    free, _ = torch.cuda.mem_get_info()
    if options.room is not None:
        free = min(free, options.room())
    state = codec.new_state(1, max_chunk=MAX_CHUNK_FRAMES)
    dtype = compute_dtype(options.device, options.dtype)
    each = slot_bytes(config.talker_config, dtype, options.max_model_len) + state.bytes // 2
    # Rows are allocated in these numbers (see rows_needed): slots between two of them would waste rows.
    for slots in reversed([size for size in BATCH_SIZES if size <= MAX_SLOTS]):
        if slots * each <= (free - weight_bytes - graph_bytes(slots)) * SLOTS_SHARE:
            return slots
    message = (
        f"{free >> 20} MiB may be taken; weights take {weight_bytes >> 20} MiB, a slot {each >> 20} MiB, "
        f"and its graphs {graph_bytes(1) >> 20} MiB"
    )
    raise JobError("insufficient_vram", message, retry_after_s=30)


def slot_bytes(shape: TalkerShape, dtype: torch.dtype, max_model_len: int) -> int:
    """Bytes of one slot: keys and values, trailing text, uniforms."""
    width = dtype.itemsize
    kv = 2 * shape.num_hidden_layers * max_model_len * shape.num_key_value_heads * shape.head_dim * width
    return kv + MAX_TRAILING_TOKENS * shape.hidden_size * width + max_model_len * shape.num_code_groups * 4


def estimated_bytes(
    directory: Path,
    device: Device,
    dtype: DtypeName,
    slots: int | None,
    quantization: Quantization = "none",
    *,
    cpu_budget_bytes: int | None = None,
) -> int:
    """Bytes that the checkpoint in `directory` will take on the device; its weights are not read.

    These are its weights and its slots. If CUDA's free memory decides their number, one counts.
    "auto" counts as "none": what is the fastest is known once the model is loaded.

    Raises:
        JobError: `model_unavailable`, naming the file at fault.
    """
    computed = compute_dtype(device, dtype)
    headers = read_headers(find_tensor_files(directory))
    shape = read_config(directory).talker_config
    weights = weight_bytes(shape, headers, device, computed, quantization)
    if device == "cuda":
        return weights + (slots or 1) * slot_bytes(shape, computed, MAX_MODEL_LEN)
    if slots is None:
        slots = cpu_slots(directory, weights, computed, cpu_budget_bytes)
    fixed, each = _cpu_bytes_beside_weights(directory, computed, slots)
    return weights + fixed + slots * each


def cpu_slots(directory: Path, weight_bytes: int, computed: torch.dtype, budget_bytes: int | None) -> int:
    """The number of slots on a CPU if none is configured: as many of CPU_SLOTS as a model alone can have in the budget.

    It is one at least: if that does not fit, the model is refused with what it would need.
    """
    if budget_bytes is None:
        return CPU_SLOTS
    fixed, each = _cpu_bytes_beside_weights(directory, computed, CPU_SLOTS)
    return max(1, min(CPU_SLOTS, (budget_bytes - weight_bytes - fixed) // each))


def _cpu_bytes_beside_weights(directory: Path, computed: torch.dtype, slots: int) -> tuple[int, int]:
    """The bytes that a model takes on a CPU beside its weights, at most: in all of its slots, and in each of them."""
    shape = read_config(directory).talker_config
    predictor = shape.code_predictor_config
    traces = trace_bytes(predictor, slots, large=are_large(product_shapes(shape)))
    frame = 2 * predictor.num_hidden_layers * predictor.num_key_value_heads * predictor.head_dim * computed.itemsize
    # Each batch size has rows of its own, and each is twice the one before.
    scratch = 2 * frame * (shape.num_code_groups + 1)
    # The keys and values of a stream; the last inputs of the convolutions are a tenth of them at published sizes.
    codec = stream_bytes(directory) * 9 // 8
    each = slot_bytes(shape, computed, MAX_MODEL_LEN) + scratch + codec
    position = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * computed.itemsize
    return traces + min(MAX_PREFIX_BYTES, PREFIX_POSITIONS * position) + codec, each


def weight_bytes(
    shape: TalkerShape,
    headers: Mapping[str, TensorInfo],
    device: Device,
    computed: torch.dtype,
    quantization: Quantization,
) -> int:
    """Bytes of a checkpoint's weights on the device, and of what is computed from them at load."""
    shapes = product_shapes(shape)
    quantised = widths(quantization, device, shapes)
    large = device == "cpu" and are_large(shapes)
    as_stored = ".codec_embedding." if large else TEXT_EMBEDDING
    on_device = {name: info for name, info in headers.items() if device == "cuda" or name != TEXT_EMBEDDING}
    stored = sum(_stored_bytes(name, info, computed, quantised, as_stored) for name, info in on_device.items())
    if large:
        return stored
    return stored + first_layer_inputs_bytes(shape.code_predictor_config, computed)


def _stored_bytes(name: str, info: TensorInfo, computed: torch.dtype, widths: Mapping[str, int], as_stored: str) -> int:
    """Bytes of a tensor in memory. `widths`: see quantization.widths.

    `as_stored`: a part of the names of those that keep the dtype of the file if it is smaller.
    """
    if as_stored in name:
        return min(info.nbytes(), info.nbytes(computed))
    if len(info.shape) == 2 and (".layers." in name or "head" in name):  # noqa: PLR2004 -- a matrix
        ends = (end for end in widths if end in name)
        return math.prod(info.shape) * widths[max(ends, key=len)] if widths else info.nbytes(computed)
    return info.nbytes(computed)


def _reference_encoder(
    directory: Path, codec: Codec, speaker: SpeakerEncoder | None, options: QwenOptions
) -> Callable[[np.ndarray, bool], EncodedReference]:
    stream = options.streams.encode if options.device == "cuda" else None
    threads = torch.get_num_threads()

    def encode(waveform: np.ndarray, wants_codes: bool) -> EncodedReference:  # noqa: FBT001 -- as ReferenceCache calls it
        if speaker is None:
            raise JobError("task_mismatch", "this model takes no recording", param="ref_audio")
        pcm = torch.from_numpy(waveform)
        if stream is None:
            torch.set_num_threads(threads)  # a new thread would take the number that any other one set last
        with options.encoder_lock, torch.inference_mode(), torch.cuda.stream(stream):
            encoded = EncodedReference(speaker(pcm))
            if wants_codes:
                codes = codec.encode(pcm, directory)
                state = codec.new_state(1, max_chunk=MAX_CHUNK_FRAMES)
                codec.prime(codes, 0, state)
                encoded = EncodedReference(encoded.embedding, codes, state.snapshot(0))
        if stream is not None:
            stream.synchronize()
            for tensor in encoded.tensors():
                # The cache may drop it before these streams have read it; the next recording would reuse its memory.
                tensor.record_stream(torch.cuda.default_stream())
                tensor.record_stream(options.streams.codec)
        return encoded

    return encode
