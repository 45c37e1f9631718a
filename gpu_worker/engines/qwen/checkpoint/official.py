"""The one place that imports the official `qwen_tts` package, and what its import needs.

`import qwen_tts` loads the 25 Hz tokenizer too, although every supported checkpoint uses the 12 Hz one.
That module wants sox (it starts a shell to look for it), onnxruntime, torchaudio's compiled part
(which a CPU build of torch cannot load) and prints that flash-attn is missing.
An empty stand-in takes its place, so none of it is imported and nothing is printed.
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

_UNUSED = "qwen_tts.core.tokenizer_25hz.modeling_qwen3_tts_tokenizer_v1"


class Official(msgspec.Struct, frozen=True, kw_only=True):
    """Classes and functions of qwen-tts 0.1.1, all untyped there.

    `Model` is the user-facing wrapper with `from_pretrained`;
    `ForConditionalGeneration` and `Config` are the transformers model and its configuration;
    `Tokenizer` is the wrapper of the 12 Hz speech tokenizer, `TokenizerModel` its transformers model
    and `TokenizerEncoder` the encoder within.
    """

    Model: Any
    Config: Any
    ForConditionalGeneration: Any
    Processor: Any
    SpeakerEncoder: Any
    SpeakerEncoderConfig: Any
    mel_spectrogram: Any
    Tokenizer: Any
    TokenizerModel: Any
    TokenizerConfig: Any
    TokenizerEncoder: Any


@functools.cache
def load_official() -> Official:
    """Import the official package (seconds, the first time) and return what this project uses of it.

    Raises:
        JobError: `model_unavailable`, when qwen-tts or something it needs is not installed.
    """
    if "qwen_tts" not in sys.modules:
        stand_in = types.ModuleType(_UNUSED)
        # qwen_tts only registers this class with transformers, for a model type that we refuse.
        stand_in.__dict__["Qwen3TTSTokenizerV1Model"] = type("Qwen3TTSTokenizerV1Model", (), {})
        sys.modules[_UNUSED] = stand_in
    try:
        with warnings.catch_warnings():
            # Deprecations inside librosa, numba and transformers are theirs to fix.
            warnings.simplefilter("ignore")
            package = importlib.import_module("qwen_tts")
            models = importlib.import_module("qwen_tts.core.models")
            modeling = importlib.import_module("qwen_tts.core.models.modeling_qwen3_tts")
            configuration = importlib.import_module("qwen_tts.core.models.configuration_qwen3_tts")
            core = importlib.import_module("qwen_tts.core")
            tokenizer = importlib.import_module("qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2")
    except ImportError as error:
        sys.modules.pop(_UNUSED, None)
        raise JobError(
            "model_unavailable", f"Qwen3-TTS needs the `gpu` extra of this package: {error}", retry_after_s=None
        ) from error
    return Official(
        Model=package.Qwen3TTSModel,
        Config=models.Qwen3TTSConfig,
        ForConditionalGeneration=models.Qwen3TTSForConditionalGeneration,
        Processor=models.Qwen3TTSProcessor,
        SpeakerEncoder=modeling.Qwen3TTSSpeakerEncoder,
        SpeakerEncoderConfig=configuration.Qwen3TTSSpeakerEncoderConfig,
        mel_spectrogram=modeling.mel_spectrogram,
        Tokenizer=package.Qwen3TTSTokenizer,
        TokenizerModel=core.Qwen3TTSTokenizerV2Model,
        TokenizerConfig=core.Qwen3TTSTokenizerV2Config,
        TokenizerEncoder=tokenizer.Qwen3TTSTokenizerV2Encoder,
    )
