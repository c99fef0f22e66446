"""Sizes that all workers share: those of LuMamba tiny and of the published window."""

CHANNELS, SAMPLES, PATCH = 22, 1280, 40
WIDTH, STATES = 768, 16
"""Inner width D of a Mamba block, and states N of each feature."""
