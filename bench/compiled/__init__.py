"""What the compiler makes of the kernels, as public calls launch them."""
