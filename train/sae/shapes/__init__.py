"""SAEs whose latents are ordered: in ranges and tiers, masked by position, gated over time."""
