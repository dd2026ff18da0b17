"""The bundled 26-layer pocket model: a real Gemma-2 small enough to ship."""
