import msgspec
import pytest
import torch

from gpu_worker.engines.qwen.checkpoint.model_config import read_config, read_generation_config
from gpu_worker.engines.qwen.checkpoint.weights import load_weights
from gpu_worker.engines.qwen.codec import Codec
from gpu_worker.engines.qwen.codec import codec as codec_module
from gpu_worker.engines.qwen.kernels.selection import Kernels, fused_kernels
from gpu_worker.engines.qwen.model.attention import Sdpa
from gpu_worker.engines.qwen.model.prompt import Prompt
from gpu_worker.engines.qwen.model.qwen3_tts import Qwen3TTSModel
from gpu_worker.engines.qwen.model.sampling import SamplingParams, uniforms
from gpu_worker.engines.qwen.runtime.products_trial import Products
from tests.checkpoints import tiny
from tests.gpu_worker.engines.qwen.kernels.interpreter import interpreted

PARAMS = [
    SamplingParams(greedy=False, temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.05),
    SamplingParams(greedy=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.05),
]


@interpreted
@pytest.mark.parametrize(("frames", "groups"), [(1, 4), pytest.param(4, 16, marks=pytest.mark.soak)])
@torch.inference_mode()
def test_a_model_with_all_kernels_makes_the_same_codes(frames: int, groups: int) -> None:
    """In float32, sampled and greedy, from prompts to the frame behind the last one: kernels change no code.

    Every codebook behind the second one takes the same way.
    """
    directory = tiny("custom_voice")
    weights = load_weights(directory, "talker.", dtype=torch.float32, device="cpu")
    config, generation = read_config(directory), read_generation_config(directory)
    talker = config.talker_config
    predictor = msgspec.structs.replace(talker.code_predictor_config, num_code_groups=groups)
    talker = msgspec.structs.replace(talker, num_code_groups=groups, code_predictor_config=predictor)
    config = msgspec.structs.replace(config, talker_config=talker)
    made = []
    for kernels in (Kernels(), fused_kernels()):
        model = Qwen3TTSModel(
            weights,
            config,
            generation,
            Sdpa(torch.float32),
            kernels=kernels,
            slots=len(PARAMS),
            max_model_len=32,
            products=Products(row_multiple=1),  # the interpreter takes its time for every row of padding
        )
        hidden = model.codec_table.shape[1]
        generator = torch.Generator().manual_seed(0)
        for slot, params in enumerate(PARAMS):
            embeds = torch.randn(5 + slot, hidden, generator=generator)
            prompt = Prompt(embeds, torch.randn(2, hidden, generator=generator))
            model.state.write(
                slot, prompt, torch.randn(1, hidden, generator=generator), params, uniforms(slot, 0, 9, groups)
            )
            slots, lengths = torch.tensor([[slot], [len(embeds)]])
            model.prefill(embeds[None], slots, lengths, full_vocab=False)
        model.state.active.fill_(True)
        for _ in range(frames):
            model.code_predictor_step(len(PARAMS))
            model.talker_step(len(PARAMS), 32, full_vocab=False)
        made.append((model.state.ring_buffer[:, :frames].clone(), model.state.next_codebook0.clone()))
    (codes, following), (our_codes, our_following) = made
    assert torch.equal(our_codes, codes)
    assert torch.equal(our_following, following)
    assert codes.unique().numel() > frames * len(PARAMS)


def decoded(kernels: Kernels, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The waveform of `codes` behind a primed reference, in chunks, and the history behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec_module, "select_kernels", lambda *_: kernels)
        codec = Codec(tiny("base"), dtype=torch.float32, device=torch.device("cpu"))
    state = codec.new_state(2)
    codec.prime(codes[:1], 1, state)
    slots = torch.tensor([1])
    waves = [codec.decode(part[None], slots, state) for part in codes[1:].split([1, 2])]
    return torch.cat(waves, 1), state.history[1]


@interpreted
def test_a_codec_with_all_kernels_makes_the_same_waveform() -> None:
    """In float32, through a reference and chunks that are shorter than the history of a convolution."""
    codes = torch.randint(1024, (4, 16), generator=torch.Generator().manual_seed(0))
    for ours, wanted in zip(decoded(fused_kernels(), codes), decoded(Kernels(), codes), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
