"""Unlearning: does clamping a topic's latents take the topic away, and nothing else?"""
