"""The Triton kernels: what runs on NVIDIA GPUs. Each has a torch twin in `pagoda_kernels.reference`."""
