"""Unlearning: does clamping a topic's latents remove the topic, and nothing else?"""
