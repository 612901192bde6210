"""Samples images from a trained run.

python run_sample.py --workdir=runs/hybrid [--classes=pizza,sushi] [--per_class=8] [--sampler=ddim --steps=50]

How to sample, where it is not said, is what config.sample of the run says.
"""

from fooddiff.commands.scripts import sample

if __name__ == "__main__":
    sample()
