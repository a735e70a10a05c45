"""The same stage graph as the simulator, run by torch.distributed processes."""
