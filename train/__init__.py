"""Train sparse autoencoders from a store; never loads a language model."""

from .run.find_sae import load_sae

__all__ = ["load_sae"]
