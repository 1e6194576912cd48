"""The sides that benchmarks set next to each other."""
