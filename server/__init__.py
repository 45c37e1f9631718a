"""The web side: HTTP, audio formats and the habits of clients. It imports neither torch nor gpu_worker."""
