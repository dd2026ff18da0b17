"""Studies, one file each; `config/recipe_registry.py` finds them."""
