"""Waits for a line, and becomes the command that its arguments are: whoever wants to trace that does so meanwhile."""

import os
import sys

print("gated", flush=True)
sys.stdin.readline()
os.execvp(sys.argv[1], sys.argv[1:])
