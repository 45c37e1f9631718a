"""The operations of this package's parent as Triton kernels. Importing one of them imports Triton.

Launches say `enable_fp_fusion=False`: a product and a sum are not joined to one operation with one rounding.
"""
