"""The import of the official package: silent, and without the dependencies of its 25 Hz tokenizer."""

import subprocess
import sys


def test_the_import_is_silent_and_leaves_the_25_hz_tokenizer_out() -> None:
    """In a fresh process, with every warning an error, nothing is printed and sox and onnxruntime stay unloaded."""
    program = """
import sys
from gpu_worker.engines.qwen.checkpoint.official import load_official
assert load_official() is load_official()
assert load_official().TokenizerEncoder.__name__ == "Qwen3TTSTokenizerV2Encoder"
assert not {"sox", "onnxruntime", "torchaudio"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
