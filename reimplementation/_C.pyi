"""What Python sees of the compiled extension; its operators are registered with PyTorch."""

cuda_architectures: str
