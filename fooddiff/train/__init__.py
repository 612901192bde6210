"""Training: task -> state -> step -> loop. Knows neither files nor what is trained."""
