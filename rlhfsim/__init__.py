"""rlhfsim: predict iteration time and memory of RLHF placements."""

__version__ = "0.1.0"
