"""What `python -m gpu_worker compare` prints: the agreement of a quantised model with the exact one."""

from pathlib import Path
from typing import Any

import pytest

import gpu_worker.__main__
from gpu_worker.__main__ import EXIT_WRONG_SETTINGS, main
from gpu_worker.engines.qwen import comparison
from gpu_worker.engines.qwen.comparison import Agreement, Comparison, compare
from gpu_worker.engines.qwen.runtime import products_trial
from gpu_worker.engines.qwen.runtime.products import available
from gpu_worker.engines.qwen.runtime.products_trial import Outcome
from tests.checkpoints import tiny, wide

pytestmark = pytest.mark.timeout(600)


@pytest.mark.skipif(not (available("int8") and available("fp16")), reason="no quantised products here")
def test_errors_of_quantised_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 changes nothing of a bfloat16 checkpoint. int8 has errors of some per cent, in every codebook."""
    kernels = ["packed", "fp16", "plain"]
    monkeypatch.setattr(products_trial, "trial", lambda *_: Outcome(kernels, dict.fromkeys(kernels, 4)))
    exact = compare(wide(), "fp16", ("Hello world",), frames=2)
    assert exact.frames == 2
    assert all(found.error < 1e-4 and found.changed < 1e-3 and found.top1 == 1 for found in exact.codebooks)
    rough = compare(wide(), "int8", ("Hello world",), frames=2)
    assert all(1e-3 < found.error < 0.1 and 1e-4 < found.changed < 0.2 for found in rough.codebooks)
    assert [line.split()[0] for line in rough.lines()] == ["2", "talker,", "code", *["codebook"] * 15]


def test_the_command_names_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It takes the names that `download` takes, a file of texts, and refuses other names."""
    calls: list[Any] = []

    def fake(*arguments: Any) -> Comparison:
        calls.append(arguments)
        return Comparison(3, [Agreement(0.1, 0.2, 0.5)] * 16)

    monkeypatch.setattr(comparison, "compare", fake)
    monkeypatch.setattr(gpu_worker.__main__, "set_compute_threads", lambda *_: None)
    monkeypatch.setenv("TTS_MODEL_PATHS", f"qwen3-tts-0.6b-customvoice={tiny('custom_voice')}")
    texts = tmp_path / "texts.txt"
    texts.write_text("One.\n\nTwo.\n")
    assert main(["compare", "0.6B-CustomVoice", "--texts", str(texts), "--frames", "7"]) == 0
    assert calls == [(tiny("custom_voice"), "int8", ("One.", "Two."), 7)]
    assert "int8 beside float32, 2 texts" in capsys.readouterr().out
    for name, problem in (("0.6B-Base", "no"), ("unknown", "there are no weights for 'unknown'")):
        assert main(["compare", name]) == EXIT_WRONG_SETTINGS
        assert problem in capsys.readouterr().err
    assert main(["compare", "0.6B-CustomVoice", "--texts", str(tmp_path / "none")]) == EXIT_WRONG_SETTINGS
