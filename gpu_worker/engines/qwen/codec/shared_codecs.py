"""The codecs in use: checkpoints with the same speech tokenizer share one, from the first engine to the last."""

from pathlib import Path

import torch

from gpu_worker.engines.qwen.checkpoint.weights import codec_fingerprint
from gpu_worker.engines.qwen.codec import Codec, can_be_quantized
from gpu_worker.engines.qwen.kernels.selection import KernelSetting
from gpu_worker.engines.qwen.offload import release_storage


class SharedCodecs:
    """Counts the engines of each codec. One thread at a time may acquire and release; any thread may read `bytes`."""

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelSetting = "auto",
        may_quantize: bool = True,
        trial_file: Path | None = None,
    ) -> None:
        """`may_quantize`: False if all codecs must compute in `dtype` throughout. `trial_file`: see QwenOptions."""
        self._trial_file = trial_file
        self._may_quantize = may_quantize and can_be_quantized(dtype, device)
        self._dtype = dtype
        self._device = device
        self._kernels: KernelSetting = kernels
        self._codecs: dict[tuple[bytes, bool], Codec] = {}
        self._users: dict[tuple[bytes, bool], int] = {}

    @property
    def bytes(self) -> int:
        """Device bytes of all codecs in use."""
        return sum(codec.bytes for codec in list(self._codecs.values()))

    def acquire(self, directory: Path, *, quantized: bool = False) -> Codec:
        """The codec of the checkpoint in `directory`, for one more engine. Loads the codec if no engine uses it yet.

        `quantized`: see Codec. Engines share a codec if all of them want it so, or none of them does.

        Raises:
            JobError: `model_unavailable`, naming the file at fault.
        """
        quantized = quantized and self._may_quantize
        key = codec_fingerprint(directory), quantized
        if key not in self._codecs:
            self._codecs[key] = Codec(
                directory,
                dtype=self._dtype,
                device=self._device,
                kernels=self._kernels,
                quantized=quantized,
                trial_file=self._trial_file,
            )
        self._users[key] = self._users.get(key, 0) + 1
        return self._codecs[key]

    def release(self, codec: Codec) -> None:
        """One engine less uses `codec`. The last one frees the memory of the codec."""
        key = next(key for key, held in self._codecs.items() if held is codec)
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key], self._codecs[key]
            release_storage(codec.tensors())
