"""Web demo: images that appear token by token, and two models side by side on the same image."""
