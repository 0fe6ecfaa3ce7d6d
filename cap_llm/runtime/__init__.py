"""What a stage stands on: errors, ranks, the run directory and the console."""
