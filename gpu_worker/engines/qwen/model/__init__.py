"""The model: talker, code predictor, their layers and caches, sampling, prompts and the speaker encoder.

Owns the arithmetic from prompt to codes, equal to the official package's. It knows no requests and no audio formats.
"""
