"""An engine with no model, for tests and for load tests of everything else."""
