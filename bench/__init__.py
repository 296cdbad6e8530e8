"""Fused against naive: measurements, and what the compiler made of the kernels."""
