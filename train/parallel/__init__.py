"""Several processes that train one run: ranks, and tensors of which each holds some rows."""
