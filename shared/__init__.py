"""What the web side and the GPU worker share: protocol, settings, catalogue and rules. It imports neither side."""
