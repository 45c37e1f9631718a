"""The one place that imports the official `qwen_tts` package, and what the engine uses of it.

`import qwen_tts` also imports the 25 Hz tokenizer, but every supported checkpoint uses the 12 Hz one.
The module of the 25 Hz tokenizer imports sox (which starts a shell to find the program), onnxruntime, and the compiled
part of torchaudio (which a CPU build of torch cannot load), and prints that flash-attn is missing.
So an empty stand-in takes the place of that module: none of them is imported, and nothing is printed.
This module knows nothing of checkpoints, weights or devices.
"""

import functools
import importlib
import sys
import types
import warnings
from typing import Any

import msgspec

from gpu_worker.engines.base import JobError

_TOKENIZER_25HZ = "qwen_tts.core.tokenizer_25hz.modeling_qwen3_tts_tokenizer_v1"


class Official(msgspec.Struct, frozen=True, kw_only=True):
    """Classes and functions of qwen-tts 0.1.1 that the engine uses. The package has no type annotations.

    `SpeakerEncoder` (with its config) and `mel_spectrogram` make speaker embeddings.
    `TokenizerConfig` is the config of the 12 Hz speech tokenizer, `TokenizerEncoder` its encoder.
    """

    SpeakerEncoder: Any
    SpeakerEncoderConfig: Any
    mel_spectrogram: Any
    TokenizerConfig: Any
    TokenizerEncoder: Any


@functools.cache
def load_official() -> Official:
    """Import the official package. The first call takes seconds.

    Raises:
        JobError: `model_unavailable`: qwen-tts or a package that it needs is not installed.
    """
    if "qwen_tts" not in sys.modules:
        stand_in = types.ModuleType(_TOKENIZER_25HZ)
        # qwen_tts only registers this class with transformers, for a model type that we refuse.
        stand_in.__dict__["Qwen3TTSTokenizerV1Model"] = type("Qwen3TTSTokenizerV1Model", (), {})
        sys.modules[_TOKENIZER_25HZ] = stand_in
    try:
        with warnings.catch_warnings():
            # The deprecation warnings of librosa, numba and transformers are for their authors.
            warnings.simplefilter("ignore")
            # transformers would import scikit-learn, and that pandas, for a way of generating that is not used here:
            # 43 MB and a second of CPU time.
            transformers: Any = importlib.import_module("transformers.utils.import_utils")
            transformers._sklearn_available = False  # noqa: SLF001 -- no public way
            modeling = importlib.import_module("qwen_tts.core.models.modeling_qwen3_tts")
            configuration = importlib.import_module("qwen_tts.core.models.configuration_qwen3_tts")
            core = importlib.import_module("qwen_tts.core")
            tokenizer = importlib.import_module("qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2")
    except ImportError as error:
        sys.modules.pop(_TOKENIZER_25HZ, None)
        raise JobError("model_unavailable", f"Qwen3-TTS needs the `gpu` extra of this package: {error}") from error
    return Official(
        SpeakerEncoder=modeling.Qwen3TTSSpeakerEncoder,
        SpeakerEncoderConfig=configuration.Qwen3TTSSpeakerEncoderConfig,
        mel_spectrogram=modeling.mel_spectrogram,
        TokenizerConfig=core.Qwen3TTSTokenizerV2Config,
        TokenizerEncoder=tokenizer.Qwen3TTSTokenizerV2Encoder,
    )
