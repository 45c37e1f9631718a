"""The first code of each slot's next frame, from the talker's logits; it is kept with the talker's hidden state.

Order and arithmetic are those of Transformers' processors in float32:
repetition penalty, minimum length, (suppression: the head has no such rows), temperature, top-k, top-p, softmax.
"""

from types import SimpleNamespace
from typing import Final, Protocol

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.candidates import CANDIDATES, different_choice, invert_cdf, topk
from gpu_worker.engines.qwen.kernels.slot_tensors import SlotTensors

EOS_INDEX: Final = -1
"""Index of the end-of-speech logit: the last one."""


class NextCodebook0(Protocol):
    """Samples with each slot's own parameters."""

    def __call__(
        self,
        slots: SlotTensors,
        logits: Tensor,
        hidden: Tensor,
        prompts: Tensor | None,
        *,
        min_frames: int,
        full_vocab: bool,
    ) -> Tensor:
        """`logits` [rows, codes + 1], `hidden` [rows, hidden] -> what was sampled, int64 [rows].

        `prompts`: int64 [rows], the slots of prompts that were read: their first frame is the next one.
        None: the rows are the first slots, and the talker has read the frame that each had next.
        Only slots that are active then go to the next frame.
        `min_frames`: frames that no slot ends before.
        `full_vocab`: whether the sampling parameters of any row need the full vocabulary. CUDA takes it in any case.
        """


class SamplingTensors(msgspec.Struct, frozen=True):
    """Sampling parameters of a batch, one row each: float32 [rows, 1], but `rank` int64 [rows, 1], which is top_k - 1.

    `uniform`: float32 [rows, 1] in [0, 1), 0 for greedy rows.
    """

    temperature: Tensor
    rank: Tensor
    top_p: Tensor
    penalty: Tensor
    uniform: Tensor


def apply_repetition_penalty(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make the ids of `seen` (bool, shaped like scores) less likely, as RepetitionPenaltyLogitsProcessor does."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def sample(scores: Tensor, tensors: SamplingTensors, candidates: int) -> Tensor:
    """Sample an id a row, int64 [rows], from float32 scores [rows, vocabulary].

    Only the best `candidates` scores count, so they also bound every row's top_k.
    Among them, scores equal to the k-th best are kept, as in TopKLogitsWarper.
    """
    values, ids = topk(scores, candidates)
    values = values / tensors.temperature
    worst = values.gather(1, tensors.rank.clamp(max=candidates - 1))
    values = values.masked_fill_(values < worst, float("-inf"))
    probabilities = values.softmax(-1)
    # TopPLogitsWarper sums from the least likely candidate upwards, and always keeps the best.
    tail = probabilities.flip(-1).cumsum(-1).flip(-1)
    removed = tail <= 1 - tensors.top_p
    removed[:, 0] = False
    cumulative = probabilities.masked_fill(removed, 0.0).cumsum(-1)
    return invert_cdf(cumulative, ids, tensors.uniform * cumulative[:, -1:])


def next_codebook0(
    slots: SlotTensors,
    logits: Tensor,
    hidden: Tensor,
    prompts: Tensor | None,
    *,
    min_frames: int,
    full_vocab: bool,
) -> Tensor:
    """The reference."""
    if prompts is not None:
        uniform = slots.first_uniform.index_select(0, prompts)
        early = torch.zeros_like(prompts) < min_frames
        sampled = _sample(slots, logits, prompts, uniform, early, full_vocab=full_vocab)
        slots.hidden.index_copy_(0, prompts, hidden)
        slots.next_codebook0.index_copy_(0, prompts, sampled)
        return sampled
    part = slice(0, len(logits))
    frame, code, active = slots.frame[part], slots.next_codebook0[part], slots.active[part]
    index = torch.arange(len(logits), device=logits.device)
    slots.seen[part].index_put_((index, code), torch.ones_like(active))
    uniform = slots.uniform[part][index, frame, -1:]
    sampled = _sample(slots, logits, part, uniform, frame + 1 < min_frames, full_vocab=full_vocab)
    hidden = torch.where(active[:, None], hidden, slots.hidden[part])
    kept = torch.where(active, sampled, code)
    next_frame = frame + active
    # Nothing below allocates: a step that runs out of memory has changed all of this or nothing.
    slots.hidden[part].copy_(hidden)
    code.copy_(kept)
    frame.copy_(next_frame)
    return sampled


def _sample(
    slots: SlotTensors, logits: Tensor, rows: slice | Tensor, uniform: Tensor, early: Tensor, *, full_vocab: bool
) -> Tensor:
    """Codebook 0 of the slots `rows`, int64 [rows]. It is not the end where it is `early` (bool [rows])."""
    tensors = SamplingTensors(
        slots.temperature[rows], slots.rank[rows], slots.top_p[rows], slots.penalty[rows], uniform
    )
    scores = apply_repetition_penalty(logits.float(), slots.seen[rows], tensors.penalty)
    scores[:, EOS_INDEX] = scores[:, EOS_INDEX].masked_fill(early, float("-inf"))
    if scores.is_cuda:  # a graph has no second path; sorting all takes some µs more than the best CANDIDATES
        return sample(scores, tensors, scores.shape[1])
    sampled = sample(scores, tensors, min(CANDIDATES, scores.shape[1]))
    if full_vocab:
        sampled = torch.where(slots.full_vocab[rows], sample(scores, tensors, scores.shape[1]), sampled)
    return sampled


def disagreement(fused: NextCodebook0, device: torch.device, dtype: torch.dtype) -> str | None:
    """How `fused` differs from the reference, for prompts and for frames of random slots; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary, hidden = 6, 2049, 1024
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(device, dtype)
    logits[:, EOS_INDEX] = 20  # which the first two frames may not be
    output = torch.randn(rows, hidden, generator=generator).to(device, dtype)
    seen = torch.rand(rows, vocabulary, generator=generator) < 0.1  # noqa: PLR2004 -- a tenth
    for prompts in (None, torch.arange(rows).flip(0).to(device)):
        both = []
        for sampler in (fused, next_codebook0):
            slots = _random_slots(seen, hidden, device, dtype)
            sampled = sampler(slots, logits, output, prompts, min_frames=2, full_vocab=True)
            both.append((sampled, slots))
        (ours, our_slots), (wanted, slots) = both
        order = slice(None) if prompts is None else prompts
        # Equal logits are one choice if both were seen or neither.
        scores = torch.where(slots.seen[order], 1000.0, 0.0) + logits.float()
        if problem := different_choice(scores, ours, wanted):
            return problem
        kept = torch.where(slots.active, ours, 0) if prompts is None else ours[prompts]
        for name, value in (
            ("next_codebook0", kept),
            ("frame", slots.frame),
            ("seen", slots.seen),
            ("hidden", slots.hidden),
        ):
            if not torch.equal(getattr(our_slots, name), value):
                return f"differs from torch in the slots' {name}"
    return None


def _random_slots(seen: Tensor, hidden: int, device: torch.device, dtype: torch.dtype) -> SlotTensors:
    rows = len(seen)
    generator = torch.Generator().manual_seed(1)

    def column(*values: float) -> Tensor:
        return torch.tensor(values).to(device)[:, None]

    return SimpleNamespace(
        hidden=torch.zeros(rows, hidden).to(device, dtype),
        next_codebook0=torch.zeros(rows, dtype=torch.int64).to(device),
        frame=torch.arange(rows).to(device),
        active=(torch.arange(rows) != 1).to(device),
        seen=seen.clone().to(device),
        uniform=torch.rand(rows, rows, 16, generator=generator).to(device),
        first_uniform=torch.rand(rows, 1, generator=generator).to(device),
        temperature=column(0.9, 1.0, 0.7, 1.3, 1.0, 0.9),
        rank=column(49, 0, 19, seen.shape[1] - 1, 299, 63).long(),
        top_p=column(1.0, 1.0, 0.8, 1.0, 0.95, 0.01),
        penalty=column(1.05, 1.05, 1.0, 1.2, 1.05, 1.0),
        full_vocab=torch.ones(rows, dtype=torch.bool).to(device),
    )
