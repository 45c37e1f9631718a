"""The codecs in use: checkpoints with the same speech tokenizer share one, from the first engine to the last."""

from pathlib import Path

import torch

from gpu_worker.engines.qwen.checkpoint.weights import codec_fingerprint
from gpu_worker.engines.qwen.codec import Codec
from gpu_worker.engines.qwen.kernels.selection import KernelSetting
from gpu_worker.engines.qwen.offload import release_storage


class SharedCodecs:
    """Counts the engines of each codec. One thread at a time may acquire and release; any thread may read `bytes`."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device, kernels: KernelSetting = "auto") -> None:
        self._dtype = dtype
        self._device = device
        self._kernels: KernelSetting = kernels
        self._codecs: dict[bytes, Codec] = {}
        self._users: dict[bytes, int] = {}

    @property
    def bytes(self) -> int:
        """Device bytes of all codecs in use."""
        return sum(codec.bytes for codec in list(self._codecs.values()))

    def acquire(self, directory: Path) -> Codec:
        """The codec of the checkpoint in `directory`, for one more engine. Loads the codec if no engine uses it yet.

        Raises:
            JobError: `model_unavailable`, naming the file at fault.
        """
        key = codec_fingerprint(directory)
        if key not in self._codecs:
            self._codecs[key] = Codec(directory, dtype=self._dtype, device=self._device, kernels=self._kernels)
        self._users[key] = self._users.get(key, 0) + 1
        return self._codecs[key]

    def release(self, codec: Codec) -> None:
        """One engine less uses `codec`. The last one frees the memory of the codec."""
        key = next(key for key, held in self._codecs.items() if held is codec)
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key], self._codecs[key]
            release_storage(codec.tensors())
