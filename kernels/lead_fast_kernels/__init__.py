"""Triton kernels of the fused loss; installed as `lead_fast.kernels`. They import torch and triton, nothing else."""
