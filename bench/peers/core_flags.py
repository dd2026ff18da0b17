"""What SAEBench's core evaluation is asked for: everything."""

FLAGS = {
    "compute_kl": True,
    "compute_ce_loss": True,
    "compute_l2_norms": True,
    "compute_sparsity_metrics": True,
    "compute_variance_metrics": True,
    "compute_featurewise_density_statistics": True,
    "compute_featurewise_weight_based_metrics": True,
    "exclude_special_tokens_from_reconstruction": True,
}
