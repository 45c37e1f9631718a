"""`python -m tests.gpu_worker.engines.qwen.fake_cuda`: launches of the captured functions at published sizes, as JSON.

It builds model and codec of 1.7B in bfloat16 of tensors on torch's meta device, which have shapes and strides but no
memory, and calls one function of each kind. The code sees them as CUDA tensors (MetaAsCuda), so no GPU is needed.
torch raises where a value decides what is launched: a tensor on the meta device has none.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_worker.engines.qwen import build
from gpu_worker.engines.qwen.checkpoint.model_config import GenerationConfig, ModelConfig, Shape
from gpu_worker.engines.qwen.checkpoint.tensor_files import TensorInfo
from gpu_worker.engines.qwen.codec import Codec
from gpu_worker.engines.qwen.codec.codec_config import DecoderShape
from gpu_worker.engines.qwen.codec.decoder import Decoder
from gpu_worker.engines.qwen.kernels.selection import fused_kernels
from gpu_worker.engines.qwen.model.attention import Flash
from gpu_worker.engines.qwen.model.prompt import TEXT_EMBEDDING
from gpu_worker.engines.qwen.model.qwen3_tts import Qwen3TTSModel
from gpu_worker.engines.qwen.runner import CudaGraphModelRunner, rows_needed
from gpu_worker.engines.qwen.runtime import captured_buckets, cuda_products
from gpu_worker.engines.qwen.runtime.cuda_graphs import Key
from gpu_worker.engines.qwen.runtime.cuda_products import PRODUCTS
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Products, Quantization
from gpu_worker.engines.qwen.vocoder import Vocoder
from tests.checkpoints import codec_config, model_config
from tests.gpu_worker.engines.qwen.triton_launches import Launch, recorded

SLOTS = 64
MAX_MODEL_LEN = 2048
TEXT_VOCAB = 151_936
FREE = {"device", "empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh", "_unsafe_view"}
"""Operators that launch nothing. Views launch nothing either."""
GATHERS = {"index", "index_select", "embedding", "gather"}
"""Operators that read no more of a tensor than they return."""
SCATTERS = {"index_put", "index_copy"}
"""Operators that write no more of a tensor than they are given."""
CUDA = torch.device("cuda")
IS_CUDA = Tensor.is_cuda.__get__
DEVICE = Tensor.device.__get__
WEIGHTS_OF = {"mm": [1], "addmm": [2]}
"""The places of the weights among the arguments of products."""
SEVERAL = {"topk": 2, "sort": 4, "masked_fill": 2}
"""Operators of several kernels in torch 2.13: with copies, indices or fills of their own."""


class Launches(msgspec.Struct):
    """The launches of one call of a function."""

    kernels: Counter[str] = msgspec.field(default_factory=Counter)
    attention: set[str] = msgspec.field(default_factory=set)
    crossings: list[str] = []
    """Operators with a tensor that is not on the device."""
    triton: dict[str, Launch] = {}
    """One launch of each Triton kernel."""
    bytes: int = 0
    """Bytes that torch's operators read and write, without the keys and values of attention over lengths."""
    product_bytes: int = 0
    """Weights that products read, plain and quantised."""
    attention_reads_all: int = 0
    """Calls of attention that read all keys that they are given, whatever the lengths of the rows."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kernels": self.kernels.total(),
            "attention": sorted(self.attention),
            "crossings": self.crossings,
            "by_name": dict(self.kernels.most_common()),
            "bytes": self.bytes,
            "product_bytes": self.product_bytes,
            "attention_reads_all": self.attention_reads_all,
        }


class CountedOperators(TorchDispatchMode):
    """Counts the kernels of every operator."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        full_name = func._schema.name.rpartition("::")[2]
        name = full_name.rstrip("_")
        tensors = [item for item in _flat((args, kwargs, result)) if isinstance(item, Tensor)]
        if any(not tensor.is_meta and tensor.ndim for tensor in tensors):  # single numbers are arguments
            self._launches.crossings.append(name)
        is_view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if name == "_flash_attention_forward":
            self._launches.attention.add(_shapes(args[:3]))
            self._launches.attention_reads_all += (kwargs or {}).get("seqused_k") is None
        if name not in FREE and not is_view:
            self._launches.bytes += _bytes(name, args, result)
            self._launches.product_bytes += sum(args[place].nbytes for place in WEIGHTS_OF.get(name, ()))
            with_bias = name == "conv2d" and any(bias is not None for bias in args[2:3])
            self._launches.kernels[name] += SEVERAL.get(full_name, 1) + with_bias
        return result


class MetaAsCuda(TorchFunctionMode):
    """Shows the code tensors on the meta device as CUDA tensors, and makes them where it wants CUDA tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func == IS_CUDA:
            return args[0].is_meta
        if func == DEVICE:
            return CUDA if args[0].is_meta else args[0].device
        if kwargs and kwargs.get("device") in {CUDA, "cuda"}:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **(kwargs or {}))


class WholeKernels(TorchFunctionMode):
    """Counts functions as one kernel each that are one on CUDA, and that the meta device would take to pieces."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is functional.rms_norm:
            copies = 0 if args[0].is_contiguous() else 1
            self._launches.kernels["rms_norm"] += 1 + copies
            return args[0].new_empty(args[0].shape)
        if func is functional.scaled_dot_product_attention:
            query = args[0]
            self._launches.kernels["attention"] += 1
            self._launches.attention.add(_shapes(args))
            return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)  # as all fused kernels lay it out
        return func(*args, **(kwargs or {}))


def count(function: Callable[[], None]) -> Launches:
    """Call the function, under MetaAsCuda."""
    launches = Launches()

    def launched(launch: Launch) -> None:
        launches.kernels[launch.name] += 1
        launches.triton.setdefault(launch.name, launch)
        if launch.name == "quantized_linear":
            launches.product_bytes += launch.arguments[1].nbytes
        if any(isinstance(item, Tensor) and not item.is_meta for item in launch.arguments):
            launches.crossings.append(launch.name)

    with CountedOperators(launches), WholeKernels(launches), recorded(launched):
        function()
    return launches


def _bytes(name: str, args: tuple[Any, ...], result: Any) -> int:
    if name == "_flash_attention_forward":
        touched = [args[0], result[0]]
    elif name in GATHERS:
        touched = [result, result]
    elif name in SCATTERS:
        touched = [args[-1], args[-1]]
    else:
        touched = [args, result]
    return sum(item.nbytes for item in _flat(touched) if isinstance(item, Tensor))


def captured_functions(
    max_model_len: int = MAX_MODEL_LEN, products: Products = PLAIN, *, slots: int = SLOTS, with_codec: bool = True
) -> tuple[dict[Key, Callable[[], None]], int]:
    """The functions that an engine captures, and the bytes of its weights. Fewer slots take less time.

    Call it and them under MetaAsCuda.
    """
    functions: dict[Key, Callable[[], None]] = {}

    def capture(new: Mapping[Key, Callable[[], None]], **_: Any) -> tuple[dict[Key, Any], int]:
        functions.update(new)
        return {}, 0

    streams: Any = SimpleNamespace(
        frame_capture=None, codec_capture=None, transfer=None, codec=None, frame_pool=None, codec_pool=None
    )
    config = msgspec.convert(model_config("custom_voice", "1b7", full=True), ModelConfig)
    rows = rows_needed(slots, CUDA)
    model = Qwen3TTSModel(
        FakeWeights(_model_shapes(config)),
        config,
        GenerationConfig(),
        Flash(torch.bfloat16, heads_by_group=True),
        kernels=fused_kernels(),
        slots=rows,
        max_model_len=max_model_len,
        products=products,
    )
    vocoders: list[Vocoder] = []
    if with_codec:
        shape = msgspec.convert(codec_config(full=True)["decoder_config"], DecoderShape)
        codec = Codec.__new__(Codec)
        codec.device, codec.dtype = CUDA, torch.bfloat16
        codec._decoder = Decoder(FakeWeights(_codec_shapes(shape)), shape, fused_kernels())
        vocoders.append(Vocoder(codec, model.state.ring_buffer, SLOTS, streams))
    with patch.multiple(captured_buckets, capture_graphs=capture, warm_up=lambda *_: None):
        for captured in (CudaGraphModelRunner(model, streams), *vocoders):
            captured.prepare()
    scratch = _storages((*model.state.tensors(), *model.talker.cache.tensors(), *model.code_predictor.scratch()))
    weights = _storages(model.tensors())
    text_embedding = 2 * TEXT_VOCAB * config.talker_config.text_hidden_size
    return functions, text_embedding + sum(size for key, size in weights.items() if key not in scratch)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of each storage; tensors without memory all have the address 0."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages}


class FakeWeights(Mapping[str, Tensor]):
    """A checkpoint of tensors without values, in bfloat16. Codebooks are float32."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        dtype = torch.float32 if "_codebook" in name else torch.bfloat16
        return torch.empty(self._shapes[name], dtype=dtype, device=CUDA)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _stack_shapes(prefix: str, shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, inner, width = shape.hidden_size, shape.intermediate_size, shape.head_dim
    queries, keys = shape.num_attention_heads * width, shape.num_key_value_heads * width
    found: dict[str, tuple[int, ...]] = {f"{prefix}norm.weight": (hidden,)}
    for layer in (f"{prefix}layers.{index}." for index in range(shape.num_hidden_layers)):
        found |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        found |= {f"{layer}self_attn.{name}_norm.weight": (width,) for name in "qk"}
        found |= {f"{layer}self_attn.{name}_proj.weight": (keys, hidden) for name in "kv"}
        found |= {
            f"{layer}self_attn.q_proj.weight": (queries, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, queries),
        }
        found |= {f"{layer}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        found[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
    return found


def _model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    talker, predictor = config.talker_config, config.talker_config.code_predictor_config
    prefix = "talker.code_predictor."
    found = _stack_shapes("talker.model.", talker) | _stack_shapes(f"{prefix}model.", predictor)
    found["talker.model.codec_embedding.weight"] = found["talker.codec_head.weight"] = (
        talker.vocab_size,
        talker.hidden_size,
    )
    for book in range(talker.num_code_groups - 1):
        found[f"{prefix}model.codec_embedding.{book}.weight"] = (predictor.vocab_size, talker.hidden_size)
        found[f"{prefix}lm_head.{book}.weight"] = (predictor.vocab_size, predictor.hidden_size)
    found[f"{prefix}small_to_mtp_projection.weight"] = (predictor.hidden_size, talker.hidden_size)
    found[f"{prefix}small_to_mtp_projection.bias"] = (predictor.hidden_size,)
    return found


def _codec_shapes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    hidden, inner, latent, half = shape.hidden_size, shape.intermediate_size, shape.latent_dim, shape.codebook_dim // 2
    heads = shape.num_attention_heads * shape.head_dim
    found: dict[str, tuple[int, ...]] = {
        "pre_conv.conv.weight": (latent, shape.codebook_dim, 3),
        "pre_conv.conv.bias": (latent,),
        "pre_transformer.norm.weight": (hidden,),
        "pre_transformer.input_proj.weight": (hidden, latent),
        "pre_transformer.input_proj.bias": (hidden,),
        "pre_transformer.output_proj.weight": (latent, hidden),
        "pre_transformer.output_proj.bias": (latent,),
    }
    for group, books in (("rvq_first", 1), ("rvq_rest", shape.num_quantizers - 1)):
        found[f"quantizer.{group}.output_proj.weight"] = (shape.codebook_dim, half, 1)
        for book in (f"quantizer.{group}.vq.layers.{index}._codebook" for index in range(books)):
            found |= {
                f"{book}.cluster_usage": (shape.codebook_size,),
                f"{book}.embedding_sum": (shape.codebook_size, half),
            }
    for layer in (f"pre_transformer.layers.{index}." for index in range(shape.num_hidden_layers)):
        found |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        found |= {f"{layer}{name}_layer_scale.scale": (hidden,) for name in ("self_attn", "mlp")}
        found |= {f"{layer}self_attn.{name}_proj.weight": (heads, hidden) for name in "qkv"}
        found |= {f"{layer}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        found |= {f"{layer}self_attn.o_proj.weight": (hidden, heads), f"{layer}mlp.down_proj.weight": (hidden, inner)}
    for index, ratio in enumerate(shape.upsampling_ratios):
        block = f"upsample.{index}.1."
        found |= {
            f"upsample.{index}.0.conv.weight": (latent, latent, ratio),
            f"upsample.{index}.0.conv.bias": (latent,),
        }
        found |= {f"{block}{name}": (latent,) for name in ("gamma", "norm.weight", "norm.bias", "dwconv.conv.bias")}
        found |= {f"{block}dwconv.conv.weight": (latent, 1, 7), f"{block}pwconv1.bias": (4 * latent,)}
        found |= {f"{block}pwconv1.weight": (4 * latent, latent), f"{block}pwconv2.weight": (latent, 4 * latent)}
        found[f"{block}pwconv2.bias"] = (latent,)
    width = shape.decoder_dim
    found |= {"decoder.0.conv.weight": (width, latent, 7), "decoder.0.conv.bias": (width,)}
    for index, stride in enumerate(shape.upsample_rates, 1):
        block = f"decoder.{index}.block."
        found |= {f"{block}0.{name}": (width,) for name in ("alpha", "beta")}
        found[f"{block}1.conv.weight"] = (width, width // 2, 2 * stride)
        width //= 2
        found[f"{block}1.conv.bias"] = (width,)
        for unit in (f"{block}{number}." for number in (2, 3, 4)):
            found |= {f"{unit}act{act}.{name}": (width,) for act in (1, 2) for name in ("alpha", "beta")}
            found |= {f"{unit}conv1.conv.weight": (width, width, 7), f"{unit}conv2.conv.weight": (width, width, 1)}
            found |= {f"{unit}conv{number}.conv.bias": (width,) for number in (1, 2)}
    last = len(shape.upsample_rates) + 1
    found |= {f"decoder.{last}.{name}": (width,) for name in ("alpha", "beta")}
    found |= {f"decoder.{last + 1}.conv.weight": (1, width, 7), f"decoder.{last + 1}.conv.bias": (1,)}
    return found


def _shapes(tensors: Sequence[Tensor | None]) -> str:
    return json.dumps([[list(tensor.shape), list(tensor.stride())] for tensor in tensors if tensor is not None])


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        yield values
        return
    for value in values:
        yield from _flat(value)


def quantised_launches(quantization: Quantization) -> dict[str, Any]:
    """The launches of one frame of one row with quantised weights, the bytes of the weights, and their estimate."""
    with patch.object(cuda_products, "quantize", _shapes_quantised), recorded(lambda _: None):  # those of the load
        functions, weight_bytes = captured_functions(products=PRODUCTS[quantization], slots=1, with_codec=False)
    keys: list[Key] = [("code_predictor_step", 1, 0), ("talker_step", 1, MAX_MODEL_LEN)]
    launched = {"/".join(map(str, key)): count(functions[key]).as_dict() for key in keys}
    return {"launched": launched, "weight_bytes": weight_bytes, "estimated": estimated_bytes(quantization)}


def _shapes_quantised(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights and scales of the shapes and dtypes that `quantize` gives."""
    return torch.empty_like(weight, dtype=dtype), weight.new_empty(len(weight), dtype=torch.float32)


def estimated_bytes(quantization: Quantization) -> int:
    """The estimate of build.weight_bytes for a checkpoint of these shapes."""
    config = msgspec.convert(model_config("custom_voice", "1b7", full=True), ModelConfig)
    shapes = {**_model_shapes(config), TEXT_EMBEDDING: (TEXT_VOCAB, config.talker_config.text_hidden_size)}
    headers = {name: TensorInfo("BF16", list(shape), [0, 2 * math.prod(shape)]) for name, shape in shapes.items()}
    return build.weight_bytes(config.talker_config, headers, "cuda", torch.bfloat16, quantization)


def counts() -> dict[str, Any]:
    """The launches of the functions at the batch sizes 1 and 16, and the keys of all functions."""
    wanted: list[Key] = [
        ("code_predictor_step", 1, 0),
        ("code_predictor_step", 16, 0),
        ("talker_step", 1, 2048),
        ("talker_step", 16, 2048),
        ("prefill", 1, 16),
        ("prefill", 4, 32),
        ("decode", 1, 1),
        ("decode", 16, 8),
    ]
    with MetaAsCuda(), torch.no_grad():
        functions, weight_bytes = captured_functions()
        for key in functions:
            if key[0] == "decode":  # which writes into the codec's waveform, as nothing outside this mode may
                functions[key] = torch.inference_mode()(functions[key])
        launches = {"/".join(map(str, key)): count(functions[key]) for key in wanted if key in functions}
        longer, _ = captured_functions(2 * MAX_MODEL_LEN, slots=16, with_codec=False)
        twice_as_long = count(longer["talker_step", 16, 2 * MAX_MODEL_LEN]).as_dict()
        quantised = {name: quantised_launches(name) for name in PRODUCTS}
    kernels = {name: launch for one in launches.values() for name, launch in one.triton.items()}
    return {
        "functions": ["/".join(map(str, key)) for key in functions],
        "launched": {key: one.as_dict() for key, one in launches.items()},
        "twice_as_long": twice_as_long,
        "weight_bytes": weight_bytes,
        "estimated": estimated_bytes("none"),
        "quantised": quantised,
        "compiled": {name: launch.compile() for name, launch in kernels.items()},
    }


if __name__ == "__main__":
    json.dump(counts(), sys.stdout)
