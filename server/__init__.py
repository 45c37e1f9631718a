"""The web side: HTTP, audio formats and clients' habits. No torch, no GPU."""
