"""The bundled pocket model: a 26-layer Gemma-2 small enough to travel with the package."""
