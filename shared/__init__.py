"""The parts that web side and GPU worker share: protocol, settings, catalogue and rules. It imports neither side."""
