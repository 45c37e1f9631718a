"""`python -m gpu_worker compare` prints the agreement of a quantised model with the exact one."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_worker.__main__
from gpu_worker.__main__ import EXIT_WRONG_SETTINGS, main
from gpu_worker.engines.qwen import comparison
from gpu_worker.engines.qwen.comparison import Agreement, Comparison, compare
from gpu_worker.engines.qwen.runtime import products_trial
from gpu_worker.engines.qwen.runtime.cuda_products import PRODUCTS
from gpu_worker.engines.qwen.runtime.products import available
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Outcome
from tests.checkpoints import tiny, wide

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def _tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial is made."""
    kernels = ["packed", "fp16", "plain"]
    monkeypatch.setattr(products_trial, "trial", lambda *_: Outcome(kernels, dict.fromkeys(kernels, 4)))


@pytest.mark.soak
@pytest.mark.skipif(not available("fp16"), reason="no fp16 products here")
@pytest.mark.usefixtures("_tried")
def test_fp16_changes_nothing() -> None:
    """Of a bfloat16 checkpoint. test_quantization.py compares its speech."""
    exact = compare(wide(), "fp16", ("Hello world",), frames=2)
    assert exact.frames == 2
    assert all(found.error < 1e-4 and found.changed < 1e-3 and found.top1 == 1 for found in exact.codebooks)


@pytest.mark.skipif(not available("int8"), reason="no int8 products here")
@pytest.mark.usefixtures("_tried")
def test_int8_has_errors_of_some_per_cent() -> None:
    """In every codebook."""
    rough = compare(wide(), "int8", ("Hello world",), frames=2)
    assert rough.frames == 2
    assert all(1e-3 < found.error < 0.1 and 1e-4 < found.changed < 0.2 for found in rough.codebooks)
    assert [line.split()[0] for line in rough.lines()] == ["2", "talker,", "code", *["codebook"] * 15]


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_gpu_compares_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch, quantization: str) -> None:
    """With the weights that a GPU has, computed by the reference of its kernel: errors, and more of them in fp8."""

    class TorchOnCpu:
        """torch, but for the device that is named."""

        def __getattr__(self, name: str) -> Any:
            return (lambda _: torch.device("cpu")) if name == "device" else getattr(torch, name)

    monkeypatch.setattr(comparison, "torch", TorchOnCpu())
    monkeypatch.setattr(comparison, "choose", lambda kind, *_: PRODUCTS.get(kind, PLAIN))
    directory = tiny("custom_voice")
    found = compare(directory, quantization, ("Hello world",), frames=3, device="cuda", dtype="auto")  # type: ignore[arg-type]
    assert all(1e-3 < one.error < 0.3 for one in found.codebooks)
    exact = compare(directory, "none", ("Hello world",), frames=1, device="cuda", dtype="auto")
    assert all((one.error, one.changed, one.top1) == (0, 0, 1) for one in exact.codebooks)


def test_what_the_gpu_cannot_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing GPU, one that lacks float8, and what is for a CPU."""
    monkeypatch.setattr(gpu_worker.__main__, "set_compute_threads", lambda *_: None)
    monkeypatch.setenv("TTS_MODEL_PATHS", f"qwen3-tts-0.6b-customvoice={tiny('custom_voice')}")
    command = ["compare", "0.6B-CustomVoice", "--device", "cuda", "--quantization"]
    monkeypatch.setattr(gpu_worker.__main__, "cuda_present", lambda: False)
    assert main([*command, "int8"]) == EXIT_WRONG_SETTINGS
    assert "there is no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(gpu_worker.__main__, "cuda_present", lambda: True)
    monkeypatch.setattr(gpu_worker.__main__, "cuda_problem", lambda: None)
    monkeypatch.setattr(gpu_worker.__main__, "cuda_capability", lambda: (8, 6))
    for quantization, problem in (("fp8", "fp8 needs a GPU of compute capability 8.9"), ("fp16", "is for a CPU")):
        assert main([*command, quantization]) == EXIT_WRONG_SETTINGS
        assert problem in capsys.readouterr().err


def test_the_command_names_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It takes the names that `download` takes, a file of texts, and refuses other names."""
    calls: list[Any] = []

    def fake(*arguments: Any, **named: Any) -> Comparison:
        calls.append((*arguments, named))
        return Comparison(3, [Agreement(0.1, 0.2, 0.5)] * 16)

    monkeypatch.setattr(comparison, "compare", fake)
    monkeypatch.setattr(gpu_worker.__main__, "set_compute_threads", lambda *_: None)
    monkeypatch.setenv("TTS_MODEL_PATHS", f"qwen3-tts-0.6b-customvoice={tiny('custom_voice')}")
    texts = tmp_path / "texts.txt"
    texts.write_text("One.\n\nTwo.\n")
    assert main(["compare", "0.6B-CustomVoice", "--texts", str(texts), "--frames", "7"]) == 0
    on_cpu = {"device": "cpu", "dtype": "float32"}
    assert calls == [(tiny("custom_voice"), "int8", ("One.", "Two."), 7, on_cpu)]
    assert "int8 beside float32, 2 texts" in capsys.readouterr().out
    for name, problem in (("0.6B-Base", "no"), ("unknown", "there are no weights for 'unknown'")):
        assert main(["compare", name]) == EXIT_WRONG_SETTINGS
        assert problem in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "0.6B-CustomVoice", "--texts", str(tmp_path / "none")])
    assert "none cannot be read: No such file" in capsys.readouterr().err
