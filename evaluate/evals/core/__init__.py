"""The core evaluation: the model's losses, sparsity and reconstruction, as SAEBench measures them."""
