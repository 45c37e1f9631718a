"""The Qwen3-TTS engine: build.py opens one from a checkpoint, engine.py runs it.

Owns everything about this model family. Importing its modules imports torch, so the package itself imports none.
"""
