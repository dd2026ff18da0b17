"""From trained sparse autoencoders to numbers and pictures."""
