"""The random checkpoints: the official package loads them, and their full sizes are the published ones."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpu_worker.engines.qwen.checkpoint.verification import verify
from tests.checkpoints import Kind, Size, checkpoint_name, codec_config, main, model_config, tiny
from tests.official_package import official_package, quick_masks

MODELS: list[tuple[Kind, Size]] = [
    ("custom_voice", "0b6"),
    ("custom_voice", "1b7"),
    ("voice_design", "1b7"),
    ("base", "0b6"),
    ("base", "1b7"),
]


@quick_masks()
@pytest.mark.parametrize(
    ("kind", "size"),
    [MODELS[0], MODELS[2], MODELS[3], *(pytest.param(*model, marks=pytest.mark.soak) for model in MODELS[1::3])],
)
def test_the_official_package_speaks_with_them(kind: Kind, size: Size) -> None:
    """Every official call for the model's type gives audible, unclipped audio of whole frames."""
    model = official_package().Model.from_pretrained(str(tiny(kind, size)), dtype=torch.float32)
    recording = (np.random.default_rng(0).normal(0, 0.1, 12_000).astype(np.float32), 24_000)
    common: dict[str, Any] = {"text": "Hello world, good morning.", "language": "English", "max_new_tokens": 6}
    torch.manual_seed(2)

    if kind == "custom_voice":
        spoken = [model.generate_custom_voice(speaker="Vivian", instruct="softly", **common)]
    elif kind == "voice_design":
        spoken = [model.generate_voice_design(instruct="a deep voice", **common)]
    else:
        spoken = [
            model.generate_voice_clone(ref_audio=recording, x_vector_only_mode=True, **common),
            model.generate_voice_clone(ref_audio=recording, ref_text="the voice", **common),
        ]

    for waves, rate in spoken:
        assert rate == 24_000
        assert len(waves[0]) > 0
        assert len(waves[0]) % 1920 == 0
        assert float(np.std(waves[0])) > 0.01
        assert float(np.abs(waves[0]).max()) < 1


def test_small_ones_are_small_and_share_their_codec() -> None:
    """At most 25 MB each; the speech tokenizer is the same in all, as in the published models."""
    codecs = set()
    for kind, size in MODELS:
        files = [file for file in tiny(kind, size).rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= 25_000_000
        codecs.add((tiny(kind, size) / "speech_tokenizer" / "model.safetensors").read_bytes())
    assert len(codecs) == 1


def test_seeds_make_different_weights_and_the_same_seed_the_same_path() -> None:
    """Checkpoints are kept between runs, by seed."""
    assert tiny("base") == tiny("base")
    assert tiny("base") != tiny("base", seed=1)
    one, other = ((tiny("base", seed=seed) / "model.safetensors").read_bytes() for seed in (0, 1))
    assert len(one) == len(other)
    assert one != other


def test_odd_ones_differ_in_every_number() -> None:
    """Every value differs from the published one, so that a value which is not read changes the audio."""
    published, odd = (
        json.loads((tiny("base", generation=generation) / "generation_config.json").read_text())
        for generation in ("published", "odd")
    )
    same = {name for name, value in odd.items() if value == published[name]}
    assert same == {"do_sample", "subtalker_dosample", "subtalker_top_p"}
    weights = [tiny("base", generation=generation) / "model.safetensors" for generation in ("published", "odd")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(("size", "millions"), [("0b6", 906), ("1b7", 1917)])
def test_full_sizes_are_the_published_ones(size: Size, millions: int) -> None:
    """Parameters in all, as published; counted without making them."""
    official = official_package()
    with torch.device("meta"):
        model = official.ForConditionalGeneration(official.Config(**model_config("custom_voice", size, full=True)))
        codec = official.TokenizerModel(official.TokenizerConfig(**codec_config(full=True)))

    assert round(sum(math.prod(tensor.shape) for tensor in model.state_dict().values()) / 1e6) == millions
    assert round(sum(math.prod(tensor.shape) for tensor in codec.decoder.state_dict().values()) / 1e6) == 114


def test_the_command_line_writes_them_under_their_published_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m tests.checkpoints DIR --kind base` writes both sizes of that type and refuses to overwrite."""
    monkeypatch.setattr("sys.argv", ["checkpoints", str(tmp_path), "--kind", "base"])
    main()
    for size in ("0b6", "1b7"):
        verify(tmp_path / checkpoint_name("base", size))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "exists already" in capsys.readouterr().err
