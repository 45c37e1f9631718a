"""The HTTP resources, one module each; app.py puts them together."""
