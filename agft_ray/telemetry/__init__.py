"""From engine statistics, Ray metrics and energy to windows and features."""
