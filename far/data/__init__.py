"""Images and latents on disk: sources, storage and reading."""
