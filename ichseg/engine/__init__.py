"""Who runs a network: OpenVINO on the CPU, torch on CUDA, or torch on the CPU.

In come a fold's tensors and a description of its network; out comes a callable from tiles
``(B, C, Z, Y, X)`` to scores ``(B, K, Z, Y, X)``. Neither torch nor OpenVINO is imported before one
of them is chosen. Open ``engine`` first, then ``choose``; ``machine`` says how many CPUs and how
much memory there are.
"""
