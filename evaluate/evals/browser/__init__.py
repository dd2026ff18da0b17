"""The latent browser: a folder of pages that opens from disk and shows all latents of all SAEs of a run."""
