"""Each reason to refuse a start is one sentence, with advice. No device is used."""

import importlib.util
import re
from typing import Any

import pytest
import torch

from gpu_worker.engines.qwen.device_checks import Computation, dtype_on, problems

TURING, AMPERE, ADA = (7, 5), (8, 6), (8, 9)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package triton is installed, and CUDA must not be touched."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "triton" else find_spec(name, *rest)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: pytest.fail("CUDA was started"))


@pytest.mark.parametrize(
    ("wanted", "advice"),
    [
        ({"device": "cpu", "attention_backend": "flash_attention_2"}, "flash_attention_2 needs CUDA .*; use sdpa"),
        ({"device": "cpu", "dtype": "float16"}, "a CPU computes in float32 or bfloat16"),
        ({"device": "cpu", "codec_dtype": "float16"}, "TTS_CODEC_DTYPE=float16 is for CUDA"),
        ({"device": "cpu", "quantization": "fp8"}, "fp8 needs a GPU .*; on a CPU set TTS_QUANTIZATION=int8"),
        ({"device": "cuda", "capability": AMPERE, "quantization": "fp8"}, "8.9 .* not 8.6; set TTS_QUANTIZATION=int8"),
        ({"device": "cuda", "capability": AMPERE, "kernels": "torch", "quantization": "int8"}, "set TTS_KERNELS=auto"),
        ({"device": "cuda", "quantization": "int8", "dtype": "float32"}, "leave TTS_DTYPE at auto"),
        ({"device": "cuda", "quantization": "fp16"}, "set TTS_QUANTIZATION=none or int8"),
        ({"device": "cuda", "capability": TURING, "dtype": "bfloat16"}, "TTS_DTYPE=bfloat16 needs .* 8.0 .*; set auto"),
        ({"device": "cuda", "capability": TURING, "codec_dtype": "bfloat16"}, "TTS_CODEC_DTYPE=bfloat16 needs"),
        (
            {"device": "cuda", "capability": TURING, "attention_backend": "flash_attention_2"},
            "flash_attention_2 needs a GPU of compute capability 8.0 .*; use sdpa",
        ),
        (
            {"device": "cuda", "capability": AMPERE, "attention_backend": "flash_attention_2", "dtype": "float32"},
            "flash_attention_2 needs CUDA and bfloat16 or float16",
        ),
    ],
)
def test_a_combination_is_refused(wanted: dict[str, Any], advice: str) -> None:
    """By one sentence, which names the setting."""
    (problem,) = problems(Computation(**wanted))
    assert problem.startswith("TTS_")
    assert re.search(advice, problem)
    assert not problem.endswith(".")


@pytest.mark.parametrize(
    "wanted",
    [
        {"device": "cpu"},
        {"device": "cpu", "dtype": "bfloat16"},
        {"device": "cuda"},
        {"device": "cuda", "capability": TURING, "quantization": "int8"},
        {"device": "cuda", "capability": TURING, "dtype": "float32", "kernels": "torch"},
        {"device": "cuda", "capability": AMPERE, "quantization": "int8", "attention_backend": "flash_attention_2"},
        {"device": "cuda", "capability": ADA, "quantization": "fp8", "dtype": "float16"},
        {"device": "cuda", "quantization": "fp8"},
    ],
)
def test_other_combinations_are_not(wanted: dict[str, Any]) -> None:
    """A capability that is not known is no problem yet: the load will fail with the reason."""
    assert problems(Computation(**wanted)) == []


def test_every_problem_is_told() -> None:
    """At once, not one a start."""
    wanted = Computation(device="cuda", capability=TURING, dtype="bfloat16", kernels="torch", quantization="int8")
    assert len(problems(wanted)) == 2


def test_auto_is_what_the_gpu_multiplies_fast() -> None:
    """Turing has tensor cores for float16, and none for bfloat16."""
    assert dtype_on("cuda", "auto", TURING) == "float16"
    assert dtype_on("cuda", "float32", TURING) == "float32"
    assert dtype_on("cuda", "auto", AMPERE) == dtype_on("cuda", "auto", None) == dtype_on("cpu", "auto", None) == "auto"
