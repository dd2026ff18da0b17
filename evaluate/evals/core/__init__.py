"""The core evaluation: losses of the model, sparsity and reconstruction, as SAEBench measures them."""
