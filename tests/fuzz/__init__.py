"""Differential fuzzing of the packet path: frames through the loaded program, each judged by a model in Python.

`wire`, `gateway`, `flows`, `nat`, `rewriting` and `model` are the model; `worlds` and `arena` load programs and
compare; `generator` draws; `search` finds, shrinks and counts. `scripts/fuzz` runs `fuzz.main`.
"""
