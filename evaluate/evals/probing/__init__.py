"""Probes on pooled activations: what sparse_probing, scr, tpp and sae-probes share."""
