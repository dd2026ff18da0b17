"""From a store to trained sparse autoencoders; never imports a language model."""
