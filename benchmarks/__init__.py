"""Scripts that measure and regenerate the documents' figures: ``python -m benchmarks.NAME``, in a clone."""
