"""Networks, critic ensembles, distributions, normalizers and the policy that wraps them."""
