"""GPUs through zeusd, the Zeus daemon."""
