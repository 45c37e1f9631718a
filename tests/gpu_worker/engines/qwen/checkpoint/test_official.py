"""Importing the official package: quiet, and without what only its 25 Hz tokenizer wants."""

import subprocess
import sys


def test_the_import_is_silent_and_leaves_the_25_hz_tokenizer_out() -> None:
    """In a fresh process, with every warning an error: nothing is printed, and sox and onnxruntime stay unloaded."""
    program = """
import sys
from gpu_worker.engines.qwen.checkpoint.official import load_official
assert load_official() is load_official()
assert load_official().TokenizerModel.__name__ == "Qwen3TTSTokenizerV2Model"
assert not {"sox", "onnxruntime", "torchaudio"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
