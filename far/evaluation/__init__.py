"""How good are the images: feature networks and distances between sets of features."""
