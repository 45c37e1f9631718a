"""The rows of the ring that a frame attends to."""

import msgspec
import pytest
import torch

from gpu_worker.engines.qwen.codec.codec_config import DecoderShape
from gpu_worker.engines.qwen.codec.transformer import Layer, Window
from gpu_worker.engines.qwen.kernels.norm import Norm
from gpu_worker.engines.qwen.kernels.selection import Kernels
from tests.checkpoints import codec_config

SPAN, CHUNK, ROWS = 72, 8, 80
ONE_LAYER = codec_config(full=True)["decoder_config"] | {"num_hidden_layers": 1}
"""One layer of published size."""


@pytest.mark.parametrize("position", [0, 1, 64, 70, 71, 72, 79, 80, 81, 640, 12_345])
def test_a_frame_attends_to_itself_and_the_71_before_it(position: int) -> None:
    """For each frame of a chunk, the unmasked rows of the ring hold exactly the frames of its window."""
    kv_rings = torch.zeros(1, 2, ROWS, 2, 1, 4)
    rope = (torch.zeros(4), torch.ones(4))
    window = Window(kv_rings, torch.tensor([1]), torch.tensor([position]), CHUNK, rope)
    held = {frame % ROWS: frame for frame in range(position + CHUNK)}  # later frames overwrite earlier ones

    mask = window.mask(SPAN)

    assert mask.shape == (1, 1, CHUNK, ROWS)
    for step in range(CHUNK):
        frame = position + step
        seen = sorted(held[row] for row in (mask[0, 0, step] == 0).nonzero().flatten().tolist())
        assert seen == list(range(max(0, frame - SPAN + 1), frame + 1))
    assert window.ring_rows.tolist() == [ROWS + (position + step) % ROWS for step in range(CHUNK)]


def test_a_frame_has_the_same_bits_in_a_chunk_of_any_length() -> None:
    """Heads of the published width: there torch's attention sums one or two queries in another order than four."""
    shape = msgspec.convert(ONE_LAYER, DecoderShape)
    generator = torch.Generator().manual_seed(0)
    layer = Layer(layer_weights(generator), "l", shape, Kernels())
    norm = Norm(torch.ones(shape.hidden_size), 1e-5)
    x = torch.randn(CHUNK, shape.hidden_size, generator=generator)
    rope = (torch.ones(shape.head_dim), torch.ones(shape.head_dim))
    rings = torch.randn(1, 1, ROWS, 2, shape.num_attention_heads, shape.head_dim, generator=generator)

    def outputs(chunk: int) -> torch.Tensor:
        held, parts = rings.clone(), []
        for begin in range(0, CHUNK, chunk):
            window = Window(held, torch.tensor([0]), torch.tensor([640 + begin]), chunk, rope)
            part = x[begin : begin + chunk]
            mask = window.mask(SPAN)
            parts.append(layer(part, layer.input_norm(part), 0, window, mask, following=norm)[0])
        return torch.cat(parts)

    whole = outputs(CHUNK)
    for chunk in (1, 2, 4):
        assert torch.equal(outputs(chunk), whole)


def layer_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights of one layer of ONE_LAYER, under the names of a checkpoint."""
    hidden, inner, width = 512, 1024, 1024
    shapes = {f"self_attn.{name}_proj.weight": (width, hidden) for name in "qkv"}
    shapes |= {"self_attn.o_proj.weight": (hidden, width), "mlp.down_proj.weight": (hidden, inner)}
    shapes |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    made = {f"l.{name}": 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    scales = ("input_layernorm.weight", "post_attention_layernorm.weight")
    scales += ("self_attn_layer_scale.scale", "mlp_layer_scale.scale")
    return made | {f"l.{name}": torch.ones(hidden) for name in scales}
