import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from gpu_worker.engines.base import Done, JobError
from gpu_worker.engines.qwen.build import open_engine
from gpu_worker.engines.qwen.codec import Codec
from gpu_worker.engines.qwen.codec.shared_codecs import SharedCodecs
from tests.checkpoints import tiny
from tests.gpu_worker.engines.qwen.driving import clone, run, shared, untraced

DECODER = "speech_tokenizer/model.safetensors"


@pytest.fixture(autouse=True)
def _untraced() -> Iterator[None]:
    with untraced():
        yield


@pytest.fixture
def codecs() -> SharedCodecs:
    """SharedCodecs without a codec in use."""
    return SharedCodecs(dtype=torch.float32, device=torch.device("cpu"))


def copy(source: Path, target: Path) -> Path:
    """Copy a checkpoint, file by file."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    return target


def retrained(directory: Path) -> Path:
    """Change the first values of the checkpoint's speech tokenizer. Names, shapes and size stay."""
    raw = bytearray((directory / DECODER).read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    raw[begin : begin + 4096] = bytes(value ^ 1 for value in raw[begin : begin + 4096])
    (directory / DECODER).write_bytes(raw)
    return directory


def test_checkpoints_with_equal_tokenizers_share_a_codec(codecs: SharedCodecs, tmp_path: Path) -> None:
    """Copies in any directory share it. A tokenizer with other weights has a codec of its own."""
    first = codecs.acquire(tiny("custom_voice"))
    assert codecs.acquire(tiny("base")) is first
    assert codecs.acquire(copy(tiny("base"), tmp_path / "copy")) is first
    one = codecs.bytes
    other = codecs.acquire(retrained(copy(tiny("base"), tmp_path / "other")))
    assert other is not first
    assert codecs.bytes == 2 * one


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")
def test_a_quantized_codec_is_another_one(codecs: SharedCodecs) -> None:
    """Its waveform differs slightly, and not with the split. Where the dtype is set, nothing is quantized."""
    exact, quantized = (codecs.acquire(tiny("base"), quantized=value) for value in (False, True))
    assert codecs.acquire(tiny("custom_voice"), quantized=True) is quantized
    codes = torch.randint(0, 96, (1, 8, 16), generator=torch.Generator().manual_seed(0))

    def decoded(codec: Codec, *chunks: int) -> torch.Tensor:
        state = codec.new_state(1)
        parts = codes.split_with_sizes(list(chunks), 1)
        return torch.cat([codec.decode(part, torch.tensor([0]), state) for part in parts], 1)

    wave, wanted = decoded(quantized, 8), decoded(exact, 8)
    assert 0 < float((wave - wanted).norm() / wanted.norm()) < 0.03
    assert torch.equal(wave, decoded(quantized, 1, 1, 2, 4))
    for name, held in (("may_quantize", {"may_quantize": False}), ("dtype", {"dtype": torch.bfloat16})):
        options = {"dtype": torch.float32, "device": torch.device("cpu")} | held
        strict = SharedCodecs(**options)
        assert strict.acquire(tiny("base"), quantized=True) is strict.acquire(tiny("base")), name


def test_the_last_user_frees_the_codec(codecs: SharedCodecs) -> None:
    """The codec stays until then, and the next user gets a new one."""
    first = codecs.acquire(tiny("custom_voice"))
    codecs.acquire(tiny("base"))
    codecs.release(first)
    assert codecs.bytes == first.bytes > 0
    codecs.release(first)
    assert codecs.bytes == 0
    assert codecs.acquire(tiny("base")) is not first


def test_engines_use_their_codec_until_they_close(codecs: SharedCodecs) -> None:
    """An offloaded engine still uses its codec. The last engine that closes frees it."""
    options = msgspec.structs.replace(shared(), codecs=codecs, slots=1, max_model_len=256)
    engines = [open_engine(tiny(kind), options) for kind in ("custom_voice", "voice_design")]
    engines[0].offload()
    engines[1].close()
    assert codecs.bytes > 0
    engines[0].close()
    assert codecs.bytes == 0


def test_a_failed_load_releases_its_codec(codecs: SharedCodecs, tmp_path: Path) -> None:
    """A codec loaded for the failed load is freed. A codec that another engine uses stays."""
    options = msgspec.structs.replace(shared(), codecs=codecs, slots=1, max_model_len=256)
    broken = copy(tiny("custom_voice"), tmp_path / "broken")
    (broken / "tokenizer_config.json").write_text("{")
    for path in (broken / "vocab.json", broken / "tokenizer.json"):
        path.unlink(missing_ok=True)
    with pytest.raises(JobError, match="tokenizer_config"):
        open_engine(broken, options)
    assert codecs.bytes == 0
    engine = open_engine(tiny("custom_voice"), options)
    held = codecs.bytes
    with pytest.raises(JobError, match="tokenizer_config"):
        open_engine(broken, options)
    assert codecs.bytes == held
    engine.close()


def test_cloning_needs_only_the_models_own_checkpoint(codecs: SharedCodecs, tmp_path: Path) -> None:
    """The encoder is loaded late, when the checkpoint of the shared decoder may have been deleted."""
    options = msgspec.structs.replace(shared(), codecs=codecs, slots=1, max_model_len=512)
    first = open_engine(copy(tiny("custom_voice"), tmp_path / "first"), options)
    shutil.rmtree(tmp_path / "first")
    second = open_engine(tiny("base"), options)
    decoder = codecs.bytes
    job = clone(1)
    job = msgspec.structs.replace(job, sampling=msgspec.structs.replace(job.sampling, max_new_tokens=2))
    assert isinstance(run(second, [job])[job.id].end, Done)
    assert codecs.bytes > decoder
    for engine in (first, second):
        engine.close()
