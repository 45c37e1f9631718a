"""The GPU worker: model residency and synthesis. No HTTP, no audio containers."""
