"""Kernels for attention over compressed caches, for GPU and TPU, each with a plain reference."""
