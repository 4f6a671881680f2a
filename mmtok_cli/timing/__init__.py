"""Time, memory and FLOPs of cases: clocks, rounds, ceilings, traces and their statistics."""
