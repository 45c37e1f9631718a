"""The tensors of the slots' state that kernels read and write. model/slot_state.py owns and describes them."""

from typing import Protocol

from torch import Tensor


class SlotTensors(Protocol):
    """The tensors of all slots, one row each."""

    hidden: Tensor
    talker_input: Tensor
    next_codebook0: Tensor
    frame: Tensor
    active: Tensor
    trailing: Tensor
    trailing_len: Tensor
    seen: Tensor
    uniform: Tensor
    first_uniform: Tensor
    ring_buffer: Tensor
    temperature: Tensor
    rank: Tensor
    top_p: Tensor
    penalty: Tensor
    full_vocab: Tensor
