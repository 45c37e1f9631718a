"""The projection of text embeddings to what the talker reads: two layers with SiLU between them."""

import functools
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.kernels.silu_mul import silu
from gpu_worker.engines.qwen.model.layers import Linear
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Products
from gpu_worker.engines.qwen.tensor_holder import TensorHolder


class TextProjection(TensorHolder):
    """Rows of the text embedding [tokens, text hidden] -> [tokens, hidden]."""

    def __init__(self, weights: Mapping[str, Tensor], products: Products = PLAIN) -> None:
        """`weights`: the checkpoint's, on the device, in the compute dtype."""
        names = [f"talker.text_projection.linear_fc{i}" for i in (1, 2)]
        matrices = [weights[f"{name}.weight"] for name in names]
        self._biases = [weights[f"{name}.bias"] for name in names]
        self.dtype = matrices[0].dtype
        self._plain: list[Tensor] = []
        """The matrices, if they are not quantised."""
        if products is PLAIN:
            self._plain = matrices
        else:
            self._by_row = [Linear(*layer, products) for layer in zip(matrices, self._biases, strict=True)]

    @functools.cached_property
    def _by_row(self) -> list[Linear]:
        """The layers by rows. A CPU keeps a copy of plain matrices for it, so it is made when it is needed."""
        return [Linear(*layer) for layer in zip(self._plain, self._biases, strict=True)]

    def at_once(self, rows: Tensor) -> Tensor:
        """The projection as the official package computes it: another number of rows may round the last bit otherwise.

        Quantised matrices multiply row by row in any case.
        """
        if not self._plain:
            return self.row_by_row(rows)
        first, second = zip(self._plain, self._biases, strict=True)
        # The official package has a batch of one here.
        return functional.linear(functional.silu(functional.linear(rows[None], *first)), *second)[0]

    def row_by_row(self, rows: Tensor) -> Tensor:
        """The projection in which a row does not depend on the others."""
        first, second = self._by_row
        return second.batch_invariant(silu(first.batch_invariant(rows)))
