"""What the avatar set is made of. Needs no torch: the command line names it."""

STYLES = (
    "critters", "planets", "sprouts", "landscape", "pixel-art", "thumbs", "voxel-art", "voxel-bot",
    "cutouts", "clay", "moods", "open-peeps", "lorelei", "patchwork", "shapes", "stack",
)  # fmt: skip
# Seeds below this train. Those from it on are the held-out reference.
HELD_OUT_SEED = 3000
