"""The commands behind run_train.py and run_sample.py: each composes objects from `build` and talks to the terminal."""
