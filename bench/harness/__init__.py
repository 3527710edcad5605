"""What the benchmarks share: token streams, timing, results, figures, verdicts."""
