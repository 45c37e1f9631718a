import pytest
import torch

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.build import MAX_SLOTS, QwenOptions, codec_dtype, slots_that_fit
from gpu_worker.engines.qwen.checkpoint.model_config import read_config
from gpu_worker.engines.qwen.checkpoint.tensor_files import find_tensor_files, read_headers
from gpu_worker.engines.qwen.model.prompt import TEXT_EMBEDDING
from gpu_worker.engines.qwen.runtime.captured_buckets import BATCH_SIZES
from tests.checkpoints import tiny
from tests.gpu_worker.engines.qwen.driving import engine, kept_parts, shared

WEIGHTS = 1 << 30


def slots(monkeypatch: pytest.MonkeyPatch, *, free: int, room: int | None = None) -> int:
    """Slots that fit on a made-up GPU with `free` bytes."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 << 30))
    codecs = shared().codecs
    options = QwenOptions(codecs=codecs, device="cuda", room=None if room is None else lambda: room)
    codec = codecs.acquire(tiny("custom_voice"))
    try:
        return slots_that_fit(WEIGHTS, read_config(tiny("custom_voice")), codec, options)
    finally:
        codecs.release(codec)


def test_slots_take_a_share_of_what_is_free_and_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small budget decides on a large GPU. If not even one slot fits, the error has the figures."""
    assert slots(monkeypatch, free=80 << 30) == MAX_SLOTS
    few = WEIGHTS + (160 << 20)
    assert slots(monkeypatch, free=80 << 30, room=few) == slots(monkeypatch, free=few) < MAX_SLOTS
    with pytest.raises(JobError, match=r"1024 MiB may be taken; weights take 1024 MiB.* its graphs \d+ MiB") as refusal:
        slots(monkeypatch, free=80 << 30, room=WEIGHTS)
    assert refusal.value.code == "insufficient_vram"


def test_the_number_of_slots_is_a_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state has as many rows anyway, so fewer slots would waste rows."""
    found = {slots(monkeypatch, free=WEIGHTS + (mib << 20)) for mib in range(150, 800, 25)}
    assert len(found) > 2
    assert found <= set(BATCH_SIZES)


def test_float16_is_refused_on_a_cpu() -> None:
    """The message names the dtypes that a CPU computes in."""
    with pytest.raises(JobError, match="a CPU computes in float32 or bfloat16") as refusal:
        engine("custom_voice", dtype="float16")
    assert refusal.value.code == "model_unavailable"


@pytest.mark.parametrize(("fast", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_codec_stays_float32_where_a_cpu_has_no_bfloat16(
    monkeypatch: pytest.MonkeyPatch, *, fast: bool, wanted: torch.dtype
) -> None:
    """Whatever the dtype of the model. On CUDA the codec has the model's dtype. A setting of its own comes first."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert codec_dtype("cpu", "bfloat16") == wanted
    assert codec_dtype("cpu", "auto") == torch.float32
    assert codec_dtype("cuda", "auto") == torch.bfloat16
    assert codec_dtype("cuda", "auto", "float32") == torch.float32
    assert codec_dtype("cpu", "auto", "bfloat16") == torch.bfloat16
    with pytest.raises(JobError, match="TTS_CODEC_DTYPE=float16 is for CUDA"):
        codec_dtype("cpu", "auto", "float16")


def test_what_cudnn_may_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening an engine keeps cuDNN from rounding the inputs of float32 convolutions to TF32.

    It also turns off cuDNN's attention, which would make a plan for every shape in the middle of a stream.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.backends.cuda.enable_cudnn_sdp(enabled=True)
    engine("custom_voice", slots=1).close()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_text_embedding_stays_in_its_file_on_a_cpu() -> None:
    """620 MB of a published checkpoint, of which a prompt needs a row for each token."""
    table = read_headers(find_tensor_files(tiny("custom_voice")))[TEXT_EMBEDDING]
    prompts = kept_parts("custom_voice").prompts
    assert table.shape not in [tuple(tensor.shape) for tensor in prompts.tensors()]
