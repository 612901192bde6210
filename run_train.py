"""Trains a diffusion model.

python run_train.py --config=configs/hybrid.py --workdir=runs/hybrid [--config.optimizer.lr=3e-4] [--dry_run]

The same command resumes a run that was interrupted.
"""

from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from fooddiff.commands import terminal

CONFIG = config_flags.DEFINE_config_file("config", None, "the config, for instance configs/digits.py")
WORKDIR = flags.DEFINE_string("workdir", None, "where the run's files go")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print parameters, FLOPs, memory and the data plan, and stop")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "this is one of several processes that work together")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Runs the command."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: write --flag=value")
    from fooddiff.commands import dry_run, train

    with terminal.session(distributed=DISTRIBUTED.value):
        if DRY_RUN.value:
            dry_run.run(CONFIG.value)
        elif WORKDIR.value is None:
            raise ValueError("--workdir is missing: where should the run's files go? For instance --workdir=runs/first")
        else:
            train.run(CONFIG.value, Path(WORKDIR.value))


if __name__ == "__main__":
    app.run(main, flags_parser=terminal.parse_flags)
