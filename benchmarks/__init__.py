"""What takeover costs beside a hand-written C loop and beside its rivals: `python -m benchmarks --help`.

Server on one CPU, load generator on another, runs interleaved, medians, ratios to the C reference of the same round.
"""
