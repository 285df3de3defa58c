"""What is read out of finished runs: comparisons, selections, where a solution first goes wrong."""
