"""Whether this node's GPUs can be tuned by this user: what `agft-ray doctor` finds out."""
