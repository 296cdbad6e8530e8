"""What the compiler made of the kernels: here without a GPU."""
