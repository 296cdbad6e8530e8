"""Compiled kernels, executed on a CPU: PTX in, results and violations out."""
