"""saemill from Python: the three verbs as functions with the words of the commands, and what they give back."""
