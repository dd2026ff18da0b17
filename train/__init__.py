"""Train sparse autoencoders from a store; never loads a language model."""

from .find import load_sae

__all__ = ["load_sae"]
