"""What acts: the policy of a run, a file, a function."""
