"""What a run came to: records, spreads, comparisons."""
