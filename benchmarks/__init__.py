"""One file a question: ``python -m benchmarks.NAME [--json]`` from the project's folder."""
