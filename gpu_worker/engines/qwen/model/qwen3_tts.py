"""The model as functions over the slots: `prefill` reads prompts, `predict` and `advance` make 80 ms for every slot.

It owns the arithmetic of a frame from state to state, and nothing that happens between frames.
The functions have fixed shapes for fixed arguments and never look at the host: an executor may run them
as they are (CPU) or capture them (CUDA).
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.qwen.checkpoint.model_config import GenerationConfig, ModelConfig
from gpu_worker.engines.qwen.model.attention import Attention
from gpu_worker.engines.qwen.model.code_predictor import CodePredictor
from gpu_worker.engines.qwen.model.kv_slots import RING, State
from gpu_worker.engines.qwen.model.layers import Weights
from gpu_worker.engines.qwen.model.sampling import WIDTH, penalise, sample
from gpu_worker.engines.qwen.model.talker import END, Rows, Talker

TEXTS: Final = 512
"""Text tokens that may trail a prompt, one a frame; more text than that is split into utterances before."""


class Qwen3TTSModel(Weights):
    """Talker, code predictor and the state of all slots."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: ModelConfig,
        generation: GenerationConfig,
        attention: Attention,
        *,
        slots: int,
        positions: int,
    ) -> None:
        """`weights`: the checkpoint's, on the device, in the compute dtype. `positions`: tokens that a slot holds."""
        shape = config.talker_config
        groups = shape.num_code_groups
        tables = ["talker.model.codec_embedding.weight"]
        tables += [f"talker.code_predictor.model.codec_embedding.{i}.weight" for i in range(groups - 1)]
        self.table = torch.cat([weights[name] for name in tables])
        starts = [0, *(shape.vocab_size + i * shape.code_predictor_config.vocab_size for i in range(groups - 1))]
        self.starts = torch.tensor(starts, device=self.table.device)
        self.talker = Talker(weights, shape, attention, self.table, slots=slots, positions=positions)
        self.predictor = CodePredictor(weights, shape, generation, attention, self.table)
        self.state = State(
            slots,
            hidden=shape.hidden_size,
            codes=shape.codes,
            groups=groups,
            texts=TEXTS,
            frames=positions,
            like=self.table,
        )

    def embed(self, codes: Tensor) -> Tensor:
        """Frames of codes, int64 [frames, groups] -> the sum of their embeddings [frames, hidden]."""
        rows = self.table.index_select(0, (codes + self.starts).flatten())
        return rows.view(*codes.shape, -1).sum(1)

    def prefill(self, embeds: Tensor, slots: Tensor, lengths: Tensor, *, wide: bool) -> None:
        """Read prompts into their slots and choose their first codebook 0; arguments as for Talker.prefill.

        `wide`: whether one of them needs more candidates than WIDTH.
        """
        state = self.state
        hidden, logits = self.talker.prefill(embeds, slots, lengths)
        frame = torch.zeros_like(slots)
        code = self._sample(logits, slots, state.first.index_select(0, slots), frame, wide=wide)
        state.hidden.index_copy_(0, slots, hidden)
        state.code.index_copy_(0, slots, code)

    def predict(self, used: int) -> None:
        """First half of a frame for the first `used` slots: all its codes, into `state.ring`.

        Their embeddings and the frame's text become the talker's input, `state.input`.
        """
        state, part = self.state, slice(0, used)
        frame = state.frame[part]
        index = torch.arange(used, device=frame.device)
        codes = self.predictor(state.hidden[part], state.code[part], state.uniform[part][index, frame])
        state.ring[part].index_put_((index, frame % RING), codes)
        text = state.trailing[part][index, torch.minimum(frame, state.trailing_length[part])]
        torch.add(self.embed(codes), text, out=state.input[part])

    def advance(self, used: int, rows: Rows, reach: int, *, wide: bool) -> None:
        """Second half: the talker reads the frame and chooses the next codebook 0, into `state.code`.

        See Decode for `rows` and `reach`, `prefill` for `wide`.
        Rows that are not active are computed and not kept, so a frame that failed midway can simply be made again.
        """
        state, part = self.state, slice(0, used)
        frame, code, active = state.frame[part], state.code[part], state.active[part]
        index = torch.arange(used, device=frame.device)
        hidden, logits = self.talker.step(state.input[part], state.start[part] + frame, rows, reach)
        state.seen[part].index_put_((index, code), torch.ones_like(active))
        uniform = state.uniform[part][index, frame, -1:]
        chosen = self._sample(logits, part, uniform, frame + 1, wide=wide)
        hidden = torch.where(active[:, None], hidden, state.hidden[part])
        chosen = torch.where(active, chosen, code)
        following = frame + active
        # Nothing below allocates: a step that runs out of memory has changed all of this or nothing.
        state.hidden[part].copy_(hidden)
        code.copy_(chosen)
        frame.copy_(following)

    def _sample(self, logits: Tensor, rows: slice | Tensor, uniform: Tensor, frame: Tensor, *, wide: bool) -> Tensor:
        """The codebook 0 that begins `frame`."""
        state = self.state
        parameters = state.parameters(rows, uniform)
        scores = penalise(logits.float(), state.seen[rows], parameters.penalty)
        early = frame < state.min_frames[rows]
        scores[:, END] = scores[:, END].masked_fill(early, float("-inf"))
        chosen = sample(scores, parameters, min(WIDTH, scores.shape[1]))
        if wide:
            chosen = torch.where(state.wide[rows], sample(scores, parameters, scores.shape[1]), chosen)
        return chosen
