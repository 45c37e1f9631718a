"""Many GPUs: the service as a Ray Serve application. Only this package imports ray.

application.py puts the application together. Its module is imported where it is needed, because ray is an extra.
"""
