"""Plain data: the schema of what is printed, the records of a run, its directory, its schedule, merging."""
