"""Several processes that train one run: ranks that share rows, and processes that hold some latents each."""
