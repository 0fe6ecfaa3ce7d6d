"""Solvers: what to do with one weight matrix. Pure functions on tensors; no files, ranks or hooks.

`W` is a weight [R, C] (R output features, C input features), `H` the second moment of its inputs
[C, C] in fp32. Error means tr((W - W_d) H (W - W_d)^T), the squared error of the outputs.
"""
