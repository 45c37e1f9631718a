"""The operations of this package's parent as Triton kernels. Importing one of them imports Triton."""
