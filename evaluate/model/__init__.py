"""The language model in parts, the windows it reads, and how batches fit into memory."""
