"""Reports from files: statistics, plots, tables, suites."""
