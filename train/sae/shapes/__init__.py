"""SAEs with an inner order: latents in ranges and tiers, masks by position, gates over time."""
