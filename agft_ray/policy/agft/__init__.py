"""The policy `agft`: AGFT's online clock tuner (arXiv 2508.01744), written anew."""
