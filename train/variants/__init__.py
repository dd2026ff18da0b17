"""Every file is a variant of SAE, and its name is the variant's id."""
