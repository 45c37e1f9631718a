"""The GPU worker: one process that owns model loading, eviction, scheduling and synthesis on one device.

It knows neither HTTP nor audio containers: it takes `Speak` messages and sends 24 kHz mono int16 PCM.
"""
