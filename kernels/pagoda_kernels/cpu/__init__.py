"""The C++ kernels, vectorized for AVX2, AVX-512 and AVX512-BF16; see docs/architecture.md, "CPU path"."""
