"""Seconds, memory and operations of cases: clocks, rounds, ceilings, traces and their statistics."""
