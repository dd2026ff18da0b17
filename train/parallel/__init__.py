"""Several processes that train one run: ranks that share rows, or processes that each hold some latents."""
