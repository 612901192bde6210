"""Training: state -> step -> loop, with checkpoints and records as the files that later stages read."""
