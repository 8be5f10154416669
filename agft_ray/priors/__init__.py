"""Experience of replicas, added up into priors."""
