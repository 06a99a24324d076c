"""Recording: which tensors to take, the recorder for a training loop, and the paper's own procedure."""
