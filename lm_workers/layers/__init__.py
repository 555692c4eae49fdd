"""Layouts and kernels of the frozen model's layers.

`kernels.Kernels` is the interface. `reference` is its plain implementation in torch, `native` the
compiled one for CPUs; tests compare the two.
"""
