"""The latent browser: a folder of pages that opens from disk and shows all latents of a run's SAEs."""
