"""Layer-wise solvers: pure functions on tensors, without files, ranks or hooks.

`W` is a weight matrix [R, C] (R output features, C input features). `H` is the second moment of
its inputs [C, C], fp32. The layer error is tr((W - W_d) H (W - W_d)^T), the squared output error.
"""
