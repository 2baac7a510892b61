"""One op at five levels: the same function, inputs and numbers, from eager PyTorch to kernels of our own.

Each level is a file: `eager`, `torchscript`, `compiled`, `triton` and `extension`. It says why the level may be missing
and prepares a call; `measure` times them all, and docs/levels.md tells what they can do and why.
"""
