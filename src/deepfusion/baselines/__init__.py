"""References that every result stands beside."""
