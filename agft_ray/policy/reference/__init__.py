"""The policy `agft_reference`: the reference implementation of AGFT, its flaws included."""
