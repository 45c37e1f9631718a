"""The operations that a GPU computes in one fused kernel each, and the choice between torch and Triton for each.

An operation has two modules:

- `kernels/NAME.py`, plain torch: the function NAME, which is the reference and the fallback, and
  `disagreement(fused, device, dtype)`, which compares another function with it: None, or what differs.
- `kernels/fused/NAME.py`, Triton: the kernel, and the function NAME, which launches it. It has the same arguments and
  results, launches one kernel, and leaves no other work to the host. Only `selection` imports it, where Triton runs.

To add one, write both modules and add a field to `selection.Kernels`. The model takes `Kernels` and calls its fields.
Every kernel keeps the rounding points of its reference. Values are widened to float32 before any arithmetic, and
rounded with `fused.rounding.rounded`. Arguments that vary from call to call must not make Triton compile again:
sizes that the model fixes are constexpr, the rows are the grid, and other numbers stand in `do_not_specialize`.

Owns these operations and their choice. Three parts of the model that several operations read hold their weights:
Norm, Rotation and Snake. Nothing here holds state.
"""
