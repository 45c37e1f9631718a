"""RMSNorm in torch, with the rounding points of the official modules."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.tensor_holder import TensorHolder


class Norm(TensorHolder):
    """RMSNorm over the last axis, computed in float32 and rounded to the model's dtype before the weight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._shape = weight.shape[-1:]
        self.eps = eps
        # x / sqrt(mean(x²) + eps) == sqrt(n) x / hypot(norm(x), sqrt(n eps)): torch has no fused kernel for CPU,
        # and this is a third of the calls of its composite one.
        self._root = math.sqrt(weight.shape[-1])
        self._floor = torch.tensor(self._root * math.sqrt(eps), dtype=torch.float32, device=weight.device)
        self._rooted = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.weight: Tensor | None = weight * self._root if self._rooted else weight

    @property
    def plain_weight(self) -> Tensor | None:
        """The weight without the factor that this class puts into it on CPU."""
        return self.weight / self._root if self._rooted and self.weight is not None else self.weight

    def fold_into(self, matrices: list[Tensor]) -> list[Tensor]:
        """Multiply the weight into all matrices [out, size] that read this norm's output, and apply it no longer.

        In float32 only: in other dtypes the official modules round in between, so the matrices come back unchanged.
        """
        weight = self.leave_weight()
        return matrices if weight is None else [matrix * weight for matrix in matrices]

    def leave_weight(self) -> Tensor | None:
        """The weight, which is applied no longer; None if it stays."""
        if self.weight is None or self.weight.dtype != torch.float32:
            return None
        weight, self.weight = self.weight, None
        return weight

    def of_part(self, part: Tensor, whole: Tensor, sizes: tuple[int, int]) -> Tensor:
        """The norm of `part`, the first of `sizes` along the second axis of `whole`.

        CUDA's kernel would copy a part that is not contiguous. The norm of all costs less than that copy.
        """
        if not part.is_cuda:
            return self(part)
        y = functional.rms_norm(whole, self._shape, None, self.eps).split_with_sizes(sizes, 1)[0]
        return y if self.weight is None else y * self.weight

    def __call__(self, x: Tensor) -> Tensor:
        """`x`: [..., size] in any float dtype -> the same shape and dtype."""
        if x.is_cuda:
            # One kernel. It computes in float32 and, without a weight, rounds where the official modules do.
            y = functional.rms_norm(x, self._shape, None, self.eps)
        elif x.dtype == torch.float32:
            y = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._floor)
        else:
            y = x.float()
            norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True).hypot_(self._floor)
            y = (y * (self._root / norm)).to(x.dtype)
        return y if self.weight is None else y * self.weight
