"""The engines: each turns text into 24 kHz mono int16 PCM behind the protocol of `base`."""
