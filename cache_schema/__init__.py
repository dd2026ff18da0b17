"""The store: what is on disk, who may write it, and what a reader may ask. Imports numpy and zarr only."""
