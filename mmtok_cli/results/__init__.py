"""What is written and printed: the schema, the plan, the run directory, merging."""
