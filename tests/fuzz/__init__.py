"""Coverage-guided fuzzing of what takes bytes and descriptors from a peer: `python -m fuzz`, in tests/.

`targets` are the functions that are fuzzed; `corpus` has a folder for each of them, an input for each corner.
"""
