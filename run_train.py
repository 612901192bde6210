"""Trains a model.

python run_train.py --config=configs/hybrid.py --workdir=runs/hybrid [--config.optimizer.lr=3e-4] [--dry_run]

The same command resumes a run that was interrupted.
"""

from fooddiff.commands.scripts import train

if __name__ == "__main__":
    train()
