"""The parts of benchmarks/first_light.py, each run in a process of its own by worker.py."""
