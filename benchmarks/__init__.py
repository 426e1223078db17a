"""Scripts that measure and regenerate the figures of the documents: ``python -m benchmarks.NAME``, in a clone."""
