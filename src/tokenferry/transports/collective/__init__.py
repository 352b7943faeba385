"""`torch.distributed` as transport: gloo on CPUs, NCCL on GPUs."""
