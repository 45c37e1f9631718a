"""Quantised weights on a processor with no more than AVX2, made of one with more by the libraries' own switches.

Such a processor adds products of int8 in pairs, in 16 bits. A switch holds for a process, so the tests run in another.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu_worker.engines.qwen.runtime import products

AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
FORCED = all(os.environ.get(name) == value for name, value in AVX2.items())
HERE = Path(__file__).parent
CODEC = "codec/test_codec.py::test_large_matrices_of_a_quantized_codec_are_half_as_large"
TESTS = ("test_quantization_avx2.py", "runtime/test_products.py", CODEC)
SPEECH = "test_quantization.py::test_int8_alone_is_int8_in_company"


@pytest.mark.skipif(FORCED, reason="this is the other process")
@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="this processor has no more than AVX2 anyway")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tests", [TESTS, pytest.param((SPEECH,), marks=pytest.mark.soak)], ids=["products", "speech"])
def test_quantised_products_hold_on_avx2(tests: tuple[str, ...]) -> None:
    """A row is the same in any company, nothing overflows, and a seed gives the same speech."""
    pytest_options = ("-q", "-x", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *pytest_options, *(f"{HERE}/{one}" for one in tests)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | AVX2
    done = subprocess.run(command, env=environment, cwd=HERE.parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(not FORCED, reason="for the process that is kept from AVX-512")
def test_the_switches_are_heard() -> None:
    """By torch, oneDNN and fbgemm, whose sums overflow without VNNI unless activations have 7 bits."""
    assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    assert not products.packs(torch.bfloat16)
    assert products._levels() == 63
