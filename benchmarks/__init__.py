"""What can be measured: each module measures one thing, and `python -m benchmarks.report` runs them and renders the numbers."""
