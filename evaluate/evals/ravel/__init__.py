"""RAVEL: can an attribute of an entity be swapped through an SAE's latents while its other attributes stay?"""
