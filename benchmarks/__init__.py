"""Scripts that measure the values in the documents: ``python -m benchmarks.NAME``, in a clone."""
