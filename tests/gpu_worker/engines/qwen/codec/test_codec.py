"""The codec as a stream: whatever the chunks, slots and company, it is the official one-shot waveform."""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.codec import Codec, DecoderState
from shared.pcm import FRAME_SAMPLES
from tests.checkpoints import hard_linked_copy, tiny
from tests.gpu_worker.engines.qwen.parity import official

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""float32; the waveform's own standard deviation is 0.1."""


@functools.cache
def codec(dtype: torch.dtype = torch.float32) -> Codec:
    """The small codec."""
    return Codec(tiny("base"), dtype=dtype, device=CPU)


@functools.cache
def some_codes(seed: int, frames: int) -> Tensor:
    """Random codes, int64 [frames, 16], among them entries that the checkpoint never used."""
    codes = torch.randint(0, 2048, (frames, 16), generator=torch.Generator().manual_seed(seed))
    codes[::50] = 96
    return codes


@functools.cache
def one_shot(seed: int, frames: int) -> Tensor:
    """What the official decoder makes of `some_codes`, float32 [samples]."""
    decoder = official("base", None).model.speech_tokenizer.model.decoder
    with torch.inference_mode():
        wave: Tensor = decoder(some_codes(seed, frames).t()[None])[0, 0]
    return wave


def stream(codes: Tensor, slot: int, state: DecoderState, chunk: int) -> Tensor:
    """Decode `codes` in chunks; the concatenated waveform, float32 [samples]."""
    slots = torch.tensor([slot])
    return torch.cat([codec().decode(part[None], slots, state)[0] for part in codes.split(chunk)])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two waveforms of equal length."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize(("chunk", "frames"), [(1, 160), (2, 160), (3, 160), (7, 700), (8, 700)])
def test_any_split_gives_the_official_waveform(chunk: int, frames: int) -> None:
    """Past the window of 72 frames and past the reach of all layers together, chunks are exact."""
    state = codec().new_state(2)

    wave = stream(some_codes(1, frames), 1, state, chunk)

    assert difference(wave, one_shot(1, frames)) <= TOLERANCE
    assert float(wave.std()) > 0.05
    assert float(wave.abs().max()) < 1  # clipping would hide differences


def test_growing_chunks_give_the_official_waveform() -> None:
    """The schedule that streams have (1, 1, 2, 4, 8, 8 ... and a rest) is one more split."""
    state = codec().new_state(1)
    parts = some_codes(2, 90).split([1, 1, 2, 4, 8, *[8] * 9, 2])

    wave = torch.cat([codec().decode(part[None], torch.tensor([0]), state)[0] for part in parts])

    assert difference(wave, one_shot(2, 90)) <= TOLERANCE


def test_streams_at_different_positions_share_a_batch() -> None:
    """Streams that joined at different frames, in any order of slots, beside padding: each is as if alone."""
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
def test_company_changes_no_bit(chunk: int) -> None:
    """On the CPU, chunks of the schedule's lengths round alone as they do in a batch: a seed gives the same audio."""
    alone = [stream(some_codes(seed, 16), 0, codec().new_state(1), chunk) for seed in range(5)]
    state = codec().new_state(5)
    codes = torch.stack([some_codes(seed, 16) for seed in range(5)])

    batch = torch.cat([codec().decode(part, torch.arange(5), state) for part in codes.split(chunk, 1)], 1)

    assert torch.equal(batch, torch.stack(alone))


def test_a_reset_slot_remembers_nothing() -> None:
    """A reused slot gives the very samples of a fresh one, and its neighbour goes on undisturbed."""
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
    """Priming is decoding the reference first and cutting its waveform away, for short and long references."""
    codes = some_codes(5, 180)
    state = codec().new_state(3)
    stream(some_codes(6, 20), 2, state, 5)  # whatever was there before

    codec().prime(codes[:reference], 2, state)

    wave = stream(codes[reference : reference + 30], 2, state, 7)
    start = reference * FRAME_SAMPLES
    assert difference(wave, one_shot(5, 180)[start : start + wave.shape[0]]) <= TOLERANCE


def test_priming_with_nothing_is_a_reset() -> None:
    """A reference without frames leaves a stream at its beginning."""
    state = codec().new_state(1)
    stream(some_codes(6, 20), 0, state, 5)

    codec().prime(torch.empty(0, 16, dtype=torch.int64), 0, state)

    assert difference(stream(some_codes(4, 8), 0, state, 8), one_shot(4, 8)) <= TOLERANCE


def test_ids_beyond_the_codebook_disturb_no_other_stream() -> None:
    """A finished stream's last frame may hold the end-of-speech id; it must not read outside the codebooks."""
    state = codec().new_state(2)
    wild = some_codes(8, 4).clone()
    wild[0, 0] = -1
    wild[1:, 0] = 2150
    wild[2, 15] = 2150

    wave = codec().decode(torch.stack([some_codes(9, 4), wild]), torch.arange(2), state)

    assert difference(wave[0], one_shot(9, 4)) <= TOLERANCE
    assert bool(torch.isfinite(wave).all())


def test_a_chunk_longer_than_the_state_allows_is_refused() -> None:
    """The ring would overwrite frames that the chunk's first frames still see."""
    state = codec().new_state(1, max_chunk=2)

    with pytest.raises(ValueError, match="3 frames at once, where the state allows 2"):
        codec().decode(some_codes(1, 3)[None], torch.tensor([0]), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_close(dtype: torch.dtype) -> None:
    """Half-precision codecs give the float32 waveform with noise at least 20 dB below it."""
    half = codec(dtype)
    state = half.new_state(1)
    parts = some_codes(1, 40).split(8)

    wave = torch.cat([half.decode(part[None], torch.tensor([0]), state)[0] for part in parts])

    expected = one_shot(1, 160)[: wave.shape[0]]
    assert wave.dtype is torch.float32
    assert float((wave - expected).square().mean()) < 0.01 * float(expected.var())


def test_codebooks_are_rounded_once() -> None:
    """Sums and counts are divided in float32, whatever the codec computes in."""
    exact, half = (codec(dtype)._decoder.codebooks.table for dtype in (torch.float32, torch.bfloat16))

    assert torch.equal(half, exact.bfloat16())


def test_bytes_count_what_is_loaded() -> None:
    """The decoder alone at first; the encoder's weights once a recording was encoded."""
    fresh = Codec(tiny("base"), dtype=torch.float32, device=CPU)
    before = fresh.bytes
    fresh.encode(torch.zeros(FRAME_SAMPLES))

    assert 0 < before < fresh.bytes
    assert fresh.bytes == sum(tensor.nbytes for tensor in fresh.tensors())


def damaged_copy(target: Path, change: dict[str, object]) -> Path:
    """A checkpoint whose codec config has other values in its decoder's part."""
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
def test_a_codec_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """Configurations we cannot follow are refused with the reason, not decoded wrongly."""
    with pytest.raises(JobError, match=message) as caught:
        Codec(damaged_copy(tmp_path / "model", change), dtype=torch.float32, device=CPU)
    assert caught.value.code == "model_unavailable"
