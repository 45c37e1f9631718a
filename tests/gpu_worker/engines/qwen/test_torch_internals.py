"""A contract with torch: the private and undocumented interfaces that the engine uses are still there.

An upgrade of torch that drops one fails here, with the name of the interface and of the module that needs it.
What they do is tested with the modules that use them.
"""

import operator
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_worker

RELIED_ON = {
    "_C._create_graph_by_tracing": "runtime/cpu_traces.py",
    "_C._create_function_from_graph": "runtime/cpu_traces.py",
    "_C._jit_pass_constant_pooling": "runtime/cpu_traces.py",
    "_C.Graph.nodes": "runtime/cpu_traces.py",
    "_C.Graph.eraseInput": "runtime/cpu_traces.py",
    "_C.Value.uses": "runtime/cpu_traces.py",
    "jit.optimized_execution": "runtime/cpu_traces.py",
    "Tensor.shape.__get__": "runtime/cpu_traces.py",
    "_C._cuda_endAllocateToPool": "runtime/cuda_graphs.py",
    "_C._cuda_releasePool": "runtime/cuda_graphs.py",
    "_C._host_emptyCache": "offload.py",
    "ops.mkldnn._reorder_linear_weight": "runtime/products.py",
    "ops.mkldnn._linear_pointwise.binary": "runtime/products.py",
    "ops.mkldnn._is_mkldnn_bf16_supported": "runtime/products.py",
    "_int_mm": "runtime/products.py",
    "cpu._is_avx512_bf16_supported": "build.py",
    "ops.aten._flash_attention_forward": "model/attention.py",
    "mkldnn_convolution": "codec/convolution.py",
    "ops.mkldnn._reorder_convolution_weight": "codec/bfloat16_conv.py",
    "ops.mkldnn._convolution_pointwise": "codec/bfloat16_conv.py",
    "cpu._is_amx_tile_supported": "codec/codec.py",
}
CUDA_ONLY = {"_C._host_emptyCache"}
"""Interfaces that a CPU build of torch does not have."""


@pytest.mark.parametrize(("name", "module"), RELIED_ON.items())
def test_torch_still_has_what_the_engine_relies_on(name: str, module: str) -> None:
    """The failure says what is missing, and which module needs it."""
    if name in CUDA_ONLY and torch.version.cuda is None:
        pytest.skip("a CPU build of torch has no such interface")
    try:
        operator.attrgetter(name)(torch)
    except AttributeError:
        pytest.fail(f"torch {torch.__version__} no longer has torch.{name}: engines/qwen/{module} relies on it")


def test_tracing_still_takes_these_arguments() -> None:
    """A trace of one addition is made, has its constants pooled, and runs."""
    x = torch.zeros(1)
    c: Any = torch._C
    try:
        graph, _ = c._create_graph_by_tracing(lambda x: x.add_(1), (x,), lambda _: "", True, False)
        c._jit_pass_constant_pooling(graph)
        run = c._create_function_from_graph("traced", graph)
    except TypeError as error:
        pytest.fail(
            f"torch {torch.__version__} traces with other arguments: runtime/cpu_traces.py relies on it: {error}"
        )
    run(x)
    assert x.item() == 2


def test_every_private_interface_of_torch_is_in_the_contract() -> None:
    """A new use of a name with a leading underscore has to be added to RELIED_ON."""
    private = re.compile(r"\btorch\.((?:\w+\.)*_[a-zA-Z]\w*(?:\.\w+)*)")
    used = {name for path in Path(gpu_worker.__path__[0]).rglob("*.py") for name in private.findall(path.read_text())}
    assert used - RELIED_ON.keys() == set()
