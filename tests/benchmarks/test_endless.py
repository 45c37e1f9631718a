"""Checkpoints that never predict end of speech."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.benchmarks.endless import silence_end
from tests.checkpoints import CODEC_EOS, tiny


def test_only_the_end_of_speech_is_silenced(tmp_path: Path) -> None:
    """One row of one tensor becomes zero; everything else stays as it was."""
    source = tiny("custom_voice") / "model.safetensors"
    target = shutil.copy(source, tmp_path)
    silence_end(Path(target))
    before, after = load_file(source), load_file(target)
    head = "talker.codec_head.weight"
    assert before[head][CODEC_EOS].any()
    assert not after[head][CODEC_EOS].any()
    before[head][CODEC_EOS] = 0
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
