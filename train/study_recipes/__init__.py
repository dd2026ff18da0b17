"""Studies, one file each; `config/recipe.py` finds them."""
