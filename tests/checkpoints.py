"""Random Qwen3-TTS checkpoints in the published layout, so that everything can be tested without published weights.

`tiny()` makes a small one of each type, and keeps it under `.cache/checkpoints/` between test runs.
`python -m tests.checkpoints DIR --size tiny|0.6B|1.7B [--kind ...]` writes checkpoints for benchmarks.
The two full sizes have the published shapes. They are written tensor by tensor, so they need little memory.

Shapes, ids, speakers and languages are those of the published config.json files.
The values are noise with the magnitudes of trained weights:
all that the official classes initialise to zero or almost zero gets a value that matters,
the heads are wide enough for argmax margins far above rounding errors,
and the end-of-speech row is wider still, so that speech ends by itself after some dozens of frames.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from tests.official_package import official_package

Kind = Literal["custom_voice", "voice_design", "base"]
Size = Literal["0b6", "1b7"]
Generation = Literal["published", "odd", "greedy talker", "greedy predictor", "greedy"]

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "checkpoints"
NAMES: Mapping[Kind, str] = {"custom_voice": "CustomVoice", "voice_design": "VoiceDesign", "base": "Base"}
SIZES: Mapping[Size, str] = {"0b6": "0.6B", "1b7": "1.7B"}

LANGUAGES = {
    "chinese": 2055,
    "english": 2050,
    "german": 2053,
    "italian": 2070,
    "portuguese": 2071,
    "spanish": 2054,
    "japanese": 2058,
    "korean": 2064,
    "french": 2061,
    "russian": 2069,
}
DIALECTS = {"beijing_dialect": 2074, "sichuan_dialect": 2062}
SPEAKERS = {
    "serena": 3066,
    "vivian": 3065,
    "uncle_fu": 3010,
    "ryan": 3061,
    "aiden": 2861,
    "ono_anna": 2873,
    "sohee": 2864,
    "eric": 2875,
    "dylan": 2878,
}
SPEAKER_DIALECTS = {"eric": "sichuan_dialect", "dylan": "beijing_dialect"}
CODEC_EOS = 2150
_PUBLISHED: Mapping[str, bool | float] = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.9,
    "top_p": 1.0,
    "top_k": 50,
    "subtalker_dosample": True,
    "subtalker_temperature": 0.9,
    "subtalker_top_p": 1.0,
    "subtalker_top_k": 50,
    "max_new_tokens": 8192,
}
_ODD: Mapping[str, bool | float] = {
    **_PUBLISHED,
    "repetition_penalty": 0.7,
    "temperature": 1.4,
    "top_p": 0.85,
    "top_k": 30,
    "subtalker_temperature": 1.6,
    "subtalker_top_k": 9,
    "max_new_tokens": 37,
}
GENERATIONS: Mapping[Generation, Mapping[str, bool | float]] = {
    "published": _PUBLISHED,
    "odd": _ODD,
    "greedy talker": {**_ODD, "do_sample": False},
    "greedy predictor": {**_ODD, "subtalker_dosample": False},
    "greedy": {**_ODD, "do_sample": False, "subtalker_dosample": False},
}
"""Contents of generation_config.json: the published ones, which are the official package's defaults, and others.

All numbers of the others differ from the published ones, except subtalker_top_p: only 1 is supported.
"""

_WIDTH = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    "rope_theta",
)
"""Fields of config.json that make the width of a transformer."""

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tts_pad>",
    "<tts_text_bos>",
    "<tts_text_eod>",
)
_PUBLISHED_IDS = dict(zip(_SPECIAL, (151643, 151644, 151645, 151671, 151672, 151673), strict=True))
# "assistant" has to be one token: the official prompt counts tokens around it.
_WORDS = ("assistant", "user", "the", "and", "ing", "hello", "speech", "voice", "world", "today", "good", "morning")

_DISTRIBUTIONS = (
    ("embedding", 0.0, 0.7),
    (r"\.(scale|gamma)$", 0.3, 0.1),  # LayerScale and ConvNeXt start almost at zero
    (r"\.(alpha|beta)$", 0.0, 0.3),  # Snake starts at zero
    (r"\.bias$", 0.0, 0.1),
)


def tiny(kind: Kind, size: Size | None = None, seed: int = 0, generation: Generation = "published") -> Path:
    """The directory of a small random checkpoint (about 15 MB), made at the first use and kept.

    `size` is the size that config.json states ("0b6" ignores instructions); voice_design defaults to "1b7".
    The talker of a "1b7" is wider than its code predictor, so there is a projection between them.
    All kinds and sizes of one seed share the weights of the speech tokenizer, as the published models do.
    `generation` chooses among GENERATIONS; the weights do not depend on it.
    """
    size = size or ("1b7" if kind == "voice_design" else "0b6")
    key = hashlib.sha256(Path(__file__).read_bytes() + f"{seed}".encode()).hexdigest()[:16]
    target = CACHE / key / generation / checkpoint_name(kind, size)
    if not target.is_dir():
        scratch = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        if generation == "published":
            write(scratch, kind, size, full=False, seed=seed)
        else:
            hard_linked_copy(tiny(kind, size, seed), scratch)
            (scratch / "generation_config.json").unlink()
            _write_json(scratch / "generation_config.json", GENERATIONS[generation])
        try:
            scratch.rename(target)
        except OSError:  # another test process has made it
            shutil.rmtree(scratch)
            if not target.is_dir():
                raise
    return target


def wide() -> Path:
    """The directory of a small CustomVoice checkpoint whose matrices have the width of the published 0.6B (200 MB).

    So they are packed, traced and quantised as published ones are. Each of the two transformers has one layer.
    """
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    target = CACHE / key / "wide" / checkpoint_name("custom_voice", "0b6")
    if not target.is_dir():
        scratch = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        write(scratch, "custom_voice", "0b6", full=False, wide=True)
        try:
            scratch.rename(target)
        except OSError:  # another test process has made it
            shutil.rmtree(scratch)
            if not target.is_dir():
                raise
    return target


def checkpoint_name(kind: Kind, size: Size) -> str:
    """The basename of the published repository, for instance `Qwen3-TTS-12Hz-0.6B-Base`."""
    return f"Qwen3-TTS-12Hz-{SIZES[size]}-{NAMES[kind]}"


def hard_linked_copy(source: Path, target: Path) -> Path:
    """Copy a checkpoint by hard links: replace its files, never write into them."""
    return shutil.copytree(source, target, copy_function=os.link)


def write(directory: Path, kind: Kind, size: Size, *, full: bool, wide: bool = False, seed: int = 0) -> None:
    """Write a whole checkpoint into a new directory, in the published shapes if `full`, else in small ones.

    `wide`: small, but for the width of the matrices of talker and code predictor.
    The model is bfloat16 and the speech tokenizer float32, as published.
    """
    official = official_package()
    config = model_config(kind, size, full=full)
    if wide:
        talker, published = config["talker_config"], model_config(kind, size, full=True)["talker_config"]
        for part, whole in (
            (talker, published),
            (talker["code_predictor_config"], published["code_predictor_config"]),
        ):
            part.update({name: whole[name] for name in _WIDTH}, num_hidden_layers=1)
        talker["rope_scaling"] = published["rope_scaling"]
        config["speaker_encoder_config"]["enc_dim"] = talker["hidden_size"]
    directory.mkdir(parents=True)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", _PUBLISHED)
    _write_text_tokenizer(directory, _special_ids(full=full))
    with torch.device("meta"):
        model = official.ForConditionalGeneration(official.Config(**config))
    _write_safetensors(directory / "model.safetensors", _shapes(model), torch.bfloat16, seed)

    codec = directory / "speech_tokenizer"
    codec.mkdir()
    config = codec_config(full=full)
    _write_json(codec / "config.json", config)
    _write_json(
        codec / "preprocessor_config.json",
        {
            "feature_extractor_type": "EncodecFeatureExtractor",
            "feature_size": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "sampling_rate": 24000,
        },
    )
    with torch.device("meta"):
        model = official.TokenizerModel(official.TokenizerConfig(**config))
    _write_safetensors(codec / "model.safetensors", _shapes(model), torch.float32, seed)


def model_config(kind: Kind, size: Size, *, full: bool) -> dict[str, Any]:
    """The contents of config.json."""
    large = size == "1b7"
    ids = _special_ids(full=full)
    shared = {"num_code_groups": 16, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000}
    if full:
        hidden = 2048 if large else 1024
        talker = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 28}
        predictor = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 5}
        heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
        text = {"text_vocab_size": 151936, "text_hidden_size": 2048}
        sections = [24, 20, 20]
        encoder: dict[str, Any] = {}
    else:
        hidden = 96 if large else 64
        talker = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
        predictor = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        text = {"text_vocab_size": max(ids.values()) + 1, "text_hidden_size": 80}
        sections = [6, 5, 5]
        encoder = {
            "enc_channels": [32, 32, 32, 32, 96],
            "enc_attention_channels": 16,
            "enc_se_channels": 16,
            "enc_res2net_scale": 4,
        }
    speaks = kind == "custom_voice"
    return {
        "architectures": ["Qwen3TTSForConditionalGeneration"],
        "model_type": "qwen3_tts",
        "tokenizer_type": "qwen3_tts_tokenizer_12hz",
        "tts_model_size": size,
        "tts_model_type": kind,
        "im_start_token_id": ids["<|im_start|>"],
        "im_end_token_id": ids["<|im_end|>"],
        "tts_pad_token_id": ids["<tts_pad>"],
        "tts_bos_token_id": ids["<tts_text_bos>"],
        "tts_eos_token_id": ids["<tts_text_eod>"],
        "speaker_encoder_config": {"enc_dim": hidden, "sample_rate": 24000, **encoder},
        "talker_config": {
            **talker,
            **heads,
            **text,
            **shared,
            "model_type": "qwen3_tts_talker",
            "vocab_size": 3072,
            "max_position_embeddings": 32768,
            "rope_scaling": {
                "interleaved": True,
                "mrope_section": sections,
                "rope_type": "default",
                "type": "default",
            },
            "codec_pad_id": 2148,
            "codec_bos_id": 2149,
            "codec_eos_token_id": CODEC_EOS,
            "codec_think_id": 2154,
            "codec_nothink_id": 2155,
            "codec_think_bos_id": 2156,
            "codec_think_eos_id": 2157,
            "codec_language_id": LANGUAGES | (DIALECTS if speaks else {}),
            "spk_id": SPEAKERS if speaks else {},
            "spk_is_dialect": {name: SPEAKER_DIALECTS.get(name, False) for name in SPEAKERS} if speaks else {},
            "code_predictor_config": {
                **predictor,
                **heads,
                **shared,
                "model_type": "qwen3_tts_talker_code_predictor",
                "vocab_size": 2048,
                "max_position_embeddings": 65536,
            },
        },
    }


def codec_config(*, full: bool) -> dict[str, Any]:
    """The contents of speech_tokenizer/config.json."""
    decoder: dict[str, Any] = {
        "codebook_size": 2048,
        "codebook_dim": 512,
        "num_quantizers": 16,
        "latent_dim": 1024,
        "decoder_dim": 1536,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "head_dim": 64,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 8,
        "sliding_window": 72,
        "upsample_rates": [8, 5, 4, 3],
        "upsampling_ratios": [2, 2],
        "layer_scale_initial_scale": 0.01,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000,
        "max_position_embeddings": 8000,
    }
    encoder: dict[str, Any] = {
        "codebook_size": 2048,
        "codebook_dim": 256,
        "vector_quantization_hidden_dimension": 256,
        "num_quantizers": 32,
        "num_semantic_quantizers": 1,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_filters": 64,
        "upsampling_ratios": [8, 6, 5, 4],
        "sliding_window": 250,
    }
    if not full:
        decoder |= {
            "codebook_dim": 32,
            "latent_dim": 48,
            "decoder_dim": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
        }
        encoder |= {
            "codebook_dim": 16,
            "vector_quantization_hidden_dimension": 16,
            "num_quantizers": 20,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_filters": 4,
            "upsample_groups": 32,
        }
    return {
        "architectures": ["Qwen3TTSTokenizerV2Model"],
        "model_type": "qwen3_tts_tokenizer_12hz",
        "encoder_valid_num_quantizers": 16,
        "input_sample_rate": 24000,
        "output_sample_rate": 24000,
        "encode_downsample_rate": 1920,
        "decode_upsample_rate": 1920,
        "encoder_config": encoder,
        "decoder_config": decoder,
    }


def _value(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The tensor of a name in the checkpoint, float32. Equal names, shapes and seeds give equal tensors."""
    if name.endswith("initialized"):
        return torch.ones(shape)
    if name.endswith(("cluster_usage", "embedding_sum", "embed_sum")):
        return _codebook(name, shape, seed)
    mean, scale = _distribution(name, shape)
    value = mean + scale * torch.empty(shape).normal_(generator=_generator(name, seed))
    if name == "talker.codec_head.weight":
        value[CODEC_EOS] *= 1.9
    return value


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if name == "talker.codec_head.weight" or ".lm_head." in name:
        return 0.0, 4 / math.sqrt(shape[1])
    for pattern, mean, deviation in _DISTRIBUTIONS:
        if re.search(pattern, name):
            return mean, deviation
    if len(shape) == 1:  # norm weights
        return 1.0, 0.2
    return 0.0, _gain(name) / math.sqrt(_fan_in(name, shape))


def _codebook(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A codebook is stored as the sums and the numbers of the vectors of its entries.

    A few entries are unused: for them the official code clamps the divisor.
    """
    prefix, _, field = name.rpartition(".")
    usage = 0.5 + 50 * torch.rand(shape[0], generator=_generator(f"{prefix}.cluster_usage", seed))
    unused = torch.arange(shape[0]) % 97 == 96
    usage[unused] = 0.0
    if field == "cluster_usage":
        return usage
    noise = torch.empty(shape).normal_(generator=_generator(name, seed))
    return noise * torch.where(unused, 1e-5, usage)[:, None]


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _fan_in(name: str, shape: tuple[int, ...]) -> float:
    """The number of products that are summed into one output."""
    if re.search(r"\.decoder\.\d+\.block\.1\.conv\.", "." + name):  # transposed, kernel twice the stride
        return 2 * shape[0]
    if re.search(r"decoder\.upsample\.\d+\.0\.conv\.", name):  # transposed, kernel equal to the stride
        return shape[0]
    return math.prod(shape[1:])


def _gain(name: str) -> float:
    """Below 1 where the residual sums of the decoder would grow until clipping hid differences."""
    if re.fullmatch(r"decoder\.decoder\.\d+\.block\.\d+\.conv[12]\.conv\.weight", name):
        return 0.5
    return 0.05 if name == "decoder.decoder.6.conv.weight" else 1.0


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    """Write a safetensors file tensor by tensor: a JSON header with offsets, then the bytes."""
    label, width = {torch.bfloat16: ("BF16", 2), torch.float32: ("F32", 4)}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            value = _value(name, shape, seed).to(dtype)
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def _special_ids(*, full: bool) -> dict[str, int]:
    """Ids of the special text tokens. In a small checkpoint they follow its small vocabulary."""
    if full:
        return _PUBLISHED_IDS
    first = len(_vocabulary())
    return {token: first + index for index, token in enumerate(_SPECIAL)}


def _merges() -> list[tuple[str, str]]:
    """Byte-pair merges that build each word of _WORDS from left to right."""
    merges: dict[tuple[str, str], None] = {}
    for word in (*_WORDS, *(f"\u0120{word}" for word in _WORDS)):  # U+0120 stands for a space in byte-level BPE
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    return list(merges)


def _vocabulary() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    shifted = [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*(chr(byte) for byte in printable), *shifted, *("".join(merge) for merge in _merges())]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _write_text_tokenizer(directory: Path, special: dict[str, int]) -> None:
    """Write a byte-level BPE tokenizer in the files of Qwen2. The vocabulary sets the ids of the special tokens."""
    _write_json(directory / "vocab.json", _vocabulary() | special)
    merges = "".join(f"{left} {right}\n" for left, right in _merges())
    (directory / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    added = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, index in special.items()
    }
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(_SPECIAL[1:]),
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "errors": "replace",
            "model_max_length": 131072,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "processor_class": "Qwen3TTSProcessor",
        },
    )
    _write_json(
        directory / "preprocessor_config.json",
        {
            "padding_side": "left",
            "padding_value": 0.0,
            "processor_class": "Qwen3TTSProcessor",
            "return_attention_mask": True,
        },
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: write checkpoints below a directory, each under its published basename."""
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoints", description=main.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=("tiny", "0.6B", "1.7B"), default="tiny")
    parser.add_argument("--kind", choices=tuple(NAMES), action="append", help="may be repeated; default: all published")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes: list[Size] = [size for size, label in SIZES.items() if arguments.size in ("tiny", label)]
    for size in sizes:
        published: list[Kind] = [kind for kind in NAMES if (size, kind) != ("0b6", "voice_design")]
        for kind in arguments.kind or published:
            target = arguments.directory / checkpoint_name(kind, size)
            if target.exists():
                parser.error(f"{target} exists already")
            write(target, kind, size, full=arguments.size != "tiny", seed=arguments.seed)
            total = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            print(f"{target}  {total / 1e6:.0f} MB")  # noqa: T201 -- a command line tool


if __name__ == "__main__":
    main()
