"""The codec as a stream: for any chunks, slots and batches it gives the waveform of the official decoder."""

import functools
import json
import math
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.codec import Codec, DecoderState
from gpu_worker.engines.qwen.codec.codec_config import DecoderShape
from gpu_worker.engines.qwen.codec.decoder import Decoder
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model import layers
from gpu_worker.engines.qwen.runtime.products import HalfThreaded, available
from shared.pcm import FRAME_SAMPLES
from tests.checkpoints import codec_config, hard_linked_copy, tiny
from tests.gpu_worker.engines.qwen.parity import official
from tests.official_package import official_package

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""In float32. The standard deviation of the waveform is 0.1."""
FRAME_BYTES = 4 * 4 * FRAME_SAMPLES
"""Of the last block's activations: four channels in float32."""


@functools.cache
def codec(dtype: torch.dtype = torch.float32) -> Codec:
    """The codec of the small checkpoints."""
    return Codec(tiny("base"), dtype=dtype, device=CPU)


@functools.cache
def some_codes(seed: int, frames: int) -> Tensor:
    """Random codes, int64 [frames, 16], some of them entries that the checkpoint never used."""
    codes = torch.randint(0, 2048, (frames, 16), generator=torch.Generator().manual_seed(seed))
    codes[::50] = 96
    return codes


@functools.cache
def one_shot(seed: int, frames: int) -> Tensor:
    """The official decoder's waveform of `some_codes`, float32 [samples]."""
    decoder = official("base", None).model.speech_tokenizer.model.decoder
    with torch.inference_mode():
        wave: Tensor = decoder(some_codes(seed, frames).t()[None])[0, 0]
    return wave


def stream(codes: Tensor, slot: int, state: DecoderState, chunk: int) -> Tensor:
    """The waveform of `codes` decoded in chunks, float32 [samples]."""
    slots = torch.tensor([slot])
    return torch.cat([codec().decode(part[None], slots, state)[0] for part in codes.split(chunk)])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two waveforms of equal length."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize(
    ("chunk", "frames"),
    [(1, 100), (3, 100), (8, 300), *(pytest.param(*more, marks=pytest.mark.soak) for more in ((2, 100), (7, 300)))],
)
def test_any_split_gives_the_official_waveform(chunk: int, frames: int) -> None:
    """Chunks are exact beyond the window of 72 frames, and beyond what the three layers see together."""
    state = codec().new_state(2)

    wave = stream(some_codes(1, frames), 1, state, chunk)

    assert difference(wave, one_shot(1, frames)) <= TOLERANCE
    assert float(wave.std()) > 0.05
    assert float(wave.abs().max()) < 1  # clipping would hide differences


def test_growing_chunks_give_the_official_waveform() -> None:
    """The chunk schedule of the engine (1, 1, 2, 4, 8, 8 ... and a rest) is one more split."""
    state = codec().new_state(1)
    parts = some_codes(2, 90).split([1, 1, 2, 4, 8, *[8] * 9, 2])

    wave = torch.cat([codec().decode(part[None], torch.tensor([0]), state)[0] for part in parts])

    assert difference(wave, one_shot(2, 90)) <= TOLERANCE


def test_streams_at_different_positions_share_a_batch() -> None:
    """Streams of different lengths, in any order of slots and beside padding, are as each one alone."""
    state = codec().new_state(4)
    lengths = {2: 0, 0: 77, 3: 5}
    waves = {slot: [stream(some_codes(slot, 125)[:start], slot, state, 8)] for slot, start in lengths.items() if start}
    waves[2] = []
    slots = torch.tensor([*lengths, state.scratch, state.scratch])
    for step in range(0, 48, 4):
        parts = [some_codes(slot, 125)[start + step : start + step + 4] for slot, start in lengths.items()]
        batch = codec().decode(torch.stack([*parts, parts[0], parts[1]]), slots, state)
        for row, slot in enumerate(lengths):
            waves[slot].append(batch[row])

    for slot, start in lengths.items():
        expected = one_shot(slot, 125)[: (start + 48) * FRAME_SAMPLES]
        assert difference(torch.cat(waves[slot]), expected) <= TOLERANCE


@pytest.mark.parametrize("chunk", [1, 2, 4, 8])
def test_the_batch_changes_no_bit(chunk: int) -> None:
    """On the CPU, chunks of the captured lengths round alone as in a batch, so a seed always gives the same audio."""
    alone = [stream(some_codes(seed, 16), 0, codec().new_state(1), chunk) for seed in range(5)]
    state = codec().new_state(5)
    codes = torch.stack([some_codes(seed, 16) for seed in range(5)])

    batch = torch.cat([codec().decode(part, torch.arange(5), state) for part in codes.split(chunk, 1)], 1)

    assert torch.equal(batch, torch.stack(alone))


@pytest.mark.parametrize("frames_at_once", [1, 3, 8, 16])
def test_large_rates_in_pieces_change_no_bit(frames_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where activations are large, a few frames of one stream are computed at a time; of small models, some streams."""
    codes = torch.stack([some_codes(seed, 16) for seed in range(3)])

    def decoded() -> tuple[Tensor, DecoderState]:
        state = codec().new_state(3)
        return torch.cat([codec().decode(part, torch.arange(3), state) for part in codes.split(8, 1)], 1), state

    whole, state = decoded()
    monkeypatch.setattr("gpu_worker.engines.qwen.codec.decoder.PIECE_BYTES", frames_at_once * FRAME_BYTES)
    pieces, other = decoded()

    assert torch.equal(pieces, whole)
    assert torch.equal(other.history, state.history)


@pytest.mark.parametrize("threads", [3, 6])
def test_the_batch_changes_no_bit_of_published_widths(threads: int) -> None:
    """Whatever convolutions oneDNN has for those rows and threads. Two streams of one frame would fit into a piece."""
    config = codec_config(full=False)
    config["decoder_config"]["decoder_dim"] = 1536
    official_classes = official_package()
    with torch.device("meta"):
        model = official_classes.TokenizerModel(official_classes.TokenizerConfig(**config)).decoder
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    weights = {name: torch.randn(size, generator=generator) for name, size in shapes.items()}
    for weight in weights.values():
        weight.abs_().div_(10) if weight.ndim == 1 else weight.div_(math.sqrt(weight[0].numel()))
    weights["decoder.6.conv.weight"] /= 100  # clipping would hide differences
    shape = msgspec.convert(config["decoder_config"], DecoderShape)
    codes = torch.stack([some_codes(seed, 2) for seed in range(3)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            decoder = Decoder(weights, shape, Kernels())

            def decoded(streams: int) -> Tensor:
                size = {"slots": streams, "max_chunk": 1}
                state = DecoderState(shape, decoder.history_size, **size, dtype=torch.float32, device=CPU)
                parts = codes[:streams].split(1, 1)
                return torch.cat([decoder(part, torch.arange(streams), state) for part in parts], 1)

            alone = decoded(1)
            assert torch.equal(decoded(3)[:1], alone)
            assert 0.01 < float(alone.std()) < 0.5
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not available("fp16_threaded"), reason="no fp16 products here")
def test_large_matrices_of_a_quantized_codec_are_half_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is small, and a stream has in company the samples that it has alone."""
    monkeypatch.setitem(layers._KERNELS, "fp16_if_large", HalfThreaded)
    monkeypatch.setattr("gpu_worker.engines.qwen.codec.codec._has_amx", lambda: False)
    half = Codec(tiny("base"), dtype=torch.float32, device=CPU, quantized=True)
    codes = torch.stack([some_codes(seed, 16) for seed in range(3)])

    def decoded(streams: int) -> Tensor:
        state = half.new_state(streams)
        parts = codes[:streams].split_with_sizes([1, 1, 2, 4, 8], 1)
        return torch.cat([half.decode(part, torch.arange(streams), state) for part in parts], 1)

    wave, wanted = decoded(1)[0], one_shot(0, 16)
    assert 0 < float((wave - wanted).norm()) < 0.003 * float(wanted.norm())
    assert torch.equal(decoded(3)[0], wave)
    assert half.bytes < 0.95 * codec().bytes


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")
def test_the_trial_of_a_quantized_codec_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file keeps both outcomes; without a file each load makes the trial."""
    trials: list[None] = []
    for exact in (True, False):
        monkeypatch.setattr(Codec, "_splits_exactly", lambda _, exact=exact: trials.append(None) or exact)
        path = tmp_path / f"{exact}.json"
        options = {"dtype": torch.float32, "device": CPU, "quantized": True}
        sizes = {Codec(tiny("base"), trial_file=path, **options).bytes for _ in range(2)}
        assert len(sizes) == 1
        assert len(trials) == 1
        Codec(tiny("base"), **options)
        assert len(trials) == 2
        trials.clear()


def test_a_reset_slot_keeps_nothing() -> None:
    """A reused slot gives the samples of a new one, and its neighbour continues unchanged."""
    state = codec().new_state(2)
    neighbour = [stream(some_codes(7, 100)[:90], 0, state, 6)]
    stream(some_codes(3, 90), 1, state, 6)

    state.reset(1)

    again = stream(some_codes(4, 40), 1, state, 8)
    neighbour.append(stream(some_codes(7, 100)[90:], 0, state, 6))
    assert torch.equal(again, stream(some_codes(4, 40), 0, codec().new_state(1), 8))
    assert difference(torch.cat(neighbour), one_shot(7, 100)) <= TOLERANCE


@pytest.mark.parametrize("reference", [1, 5, 12, 150])
def test_a_primed_stream_continues_the_reference(reference: int) -> None:
    """Priming equals decoding the reference and cutting its waveform off, for short and long references."""
    codes = some_codes(5, 180)
    state = codec().new_state(3)
    stream(some_codes(6, 20), 2, state, 5)  # the slot was used before

    codec().prime(codes[:reference], 2, state)

    wave = stream(codes[reference : reference + 30], 2, state, 7)
    start = reference * FRAME_SAMPLES
    assert difference(wave, one_shot(5, 180)[start : start + wave.shape[0]]) <= TOLERANCE


def test_priming_with_nothing_is_a_reset() -> None:
    """Priming with a reference without frames leaves a new stream."""
    state = codec().new_state(1)
    stream(some_codes(6, 20), 0, state, 5)

    codec().prime(torch.empty(0, 16, dtype=torch.int64), 0, state)

    assert difference(stream(some_codes(4, 8), 0, state, 8), one_shot(4, 8)) <= TOLERANCE


def test_ids_beyond_the_codebook_disturb_no_other_stream() -> None:
    """The last frame of a stream may have the end-of-speech id. It must not be read outside the codebooks."""
    state = codec().new_state(2)
    wild = some_codes(8, 4).clone()
    wild[0, 0] = -1
    wild[1:, 0] = 2150
    wild[2, 15] = 2150

    wave = codec().decode(torch.stack([some_codes(9, 4), wild]), torch.arange(2), state)

    assert difference(wave[0], one_shot(9, 4)) <= TOLERANCE
    assert bool(torch.isfinite(wave).all())


def test_a_chunk_longer_than_the_state_allows_is_refused() -> None:
    """The ring would overwrite frames that the first frames of the chunk attend to."""
    state = codec().new_state(1, max_chunk=2)

    with pytest.raises(ValueError, match="3 frames at once, where the state allows 2"):
        codec().decode(some_codes(1, 3)[None], torch.tensor([0]), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_close(dtype: torch.dtype) -> None:
    """In half precision, the noise is at least 20 dB below the waveform."""
    half = codec(dtype)
    state = half.new_state(1)
    parts = some_codes(1, 40).split(8)

    wave = torch.cat([half.decode(part[None], torch.tensor([0]), state)[0] for part in parts])

    expected = one_shot(1, 100)[: wave.shape[0]]
    assert wave.dtype is torch.float32
    assert float((wave - expected).square().mean()) < 0.01 * float(expected.var())


def codebooks(dtype: torch.dtype) -> Tensor:
    """The vectors of all 16 codebooks of a codec."""
    (table,) = [tensor for tensor in codec(dtype).tensors() if tensor.shape[:1] == (16 * 2048,)]
    return table


def test_codebooks_are_rounded_once() -> None:
    """Sums and counts are divided in float32, then rounded to the dtype of the codec."""
    assert torch.equal(codebooks(torch.bfloat16), codebooks(torch.float32).bfloat16())


def test_bytes_count_what_is_loaded() -> None:
    """At first these are the weights of the decoder. `encode` adds those of the encoder."""
    fresh = Codec(tiny("base"), dtype=torch.float32, device=CPU)
    before = fresh.bytes
    fresh.encode(torch.zeros(FRAME_SAMPLES))

    assert 0 < before < fresh.bytes
    assert fresh.bytes == sum(tensor.nbytes for tensor in fresh.tensors())


def damaged_copy(target: Path, change: dict[str, object]) -> Path:
    """A checkpoint whose codec config has other values for the decoder."""
    path = hard_linked_copy(tiny("base"), target) / "speech_tokenizer" / "config.json"
    content = json.loads(path.read_text())
    content["decoder_config"] |= change
    path.unlink()
    path.write_text(json.dumps(content))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "its weights have no decoder.pre_transformer.layers.3"),
        ({"num_key_value_heads": 2}, "num_key_value_heads differs"),
        ({"upsample_rates": [8, 5, 4, 2]}, "a frame is 1280 samples"),
        ({"head_dim": None}, "head_dim"),
    ],
)
def test_an_unsupported_codec_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """The error says what the decoder cannot do. Nothing is decoded wrongly."""
    with pytest.raises(JobError, match=message) as caught:
        Codec(damaged_copy(tmp_path / "model", change), dtype=torch.float32, device=CPU)
    assert caught.value.code == "model_unavailable"
