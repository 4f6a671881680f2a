"""Measuring: clock, memory, FLOPs, statistics, schedule, runner, results, traces."""
