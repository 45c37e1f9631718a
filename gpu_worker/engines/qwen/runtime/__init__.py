"""How functions run on the device: CUDA graphs and streams, traces on a CPU, buckets of input sizes, transfers.

Owns the use of torch's runtime. It knows nothing of what the functions compute.
"""
