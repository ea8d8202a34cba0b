"""Benchmarks and evaluations: drivers, baselines and plots. Started as a process by the command line."""
