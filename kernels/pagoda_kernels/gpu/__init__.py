"""The Triton kernels: what runs on NVIDIA GPUs. Each is tested against `pagoda_kernels.reference`."""
