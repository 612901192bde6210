"""Samples images from a trained run.

python run_sample.py --workdir=runs/hybrid [--classes=pizza,sushi] [--per_class=8] [--sampler=ddim --steps=50]

How to sample, where it is not said, is what config.sample of the run says.
"""

from pathlib import Path

from absl import app, flags

from fooddiff.commands import terminal

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; the newest if not given")
WEIGHTS = flags.DEFINE_string("weights", "ema", "raw, ema (the first rate of the config) or ema_<rate>")
CLASSES = flags.DEFINE_list("classes", [], "class names; all if not given")
PER_CLASS = flags.DEFINE_integer("per_class", 8, "images per class")
SAMPLER = flags.DEFINE_string("sampler", None, "ancestral, ddim, dpmpp_2m, sde_dpmpp_2m or heun")
STEPS = flags.DEFINE_integer("steps", None, "levels of noise along the way")
SPACING = flags.DEFINE_string("spacing", None, "of these levels: evenly in time or log_snr, or karras")
ETA = flags.DEFINE_float("eta", None, "stochasticity of ddim and heun, from 0 to 1")
GUIDANCE = flags.DEFINE_float("guidance", None, "scale of classifier-free guidance; 1 is off")
INTERVAL = flags.DEFINE_list("interval", None, "log SNRs between which to guide, for instance -4,4")
RESCALE = flags.DEFINE_float("rescale", None, "share of a guided image's deviation that is brought back, from 0 to 1")
SEED = flags.DEFINE_integer("seed", 0, "image i of a class depends on (seed, class, i) only")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "images per call of the compiled sampler")
SINGLE_FILES = flags.DEFINE_bool("single_files", False, "also write every image as a PNG of its own")
OUT = flags.DEFINE_string("out", None, "where the files go; WORKDIR/samples if not given")

DISTRIBUTED = flags.DEFINE_bool("distributed", False, "this is one of several processes that work together")


def main(argv: list[str]) -> None:
    """Runs the command."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: write --flag=value")
    from fooddiff.commands import sample

    with terminal.session(distributed=DISTRIBUTED.value):
        sample.run(
            Path(WORKDIR.value),
            step=STEP.value,
            weights=WEIGHTS.value,
            classes=CLASSES.value,
            per_class=PER_CLASS.value,
            spec={
                "sampler": SAMPLER.value,
                "steps": STEPS.value,
                "spacing": SPACING.value,
                "eta": ETA.value,
                "guidance": GUIDANCE.value,
                "interval": INTERVAL.value and tuple(map(float, INTERVAL.value)),
                "rescale": RESCALE.value,
            },
            seed=SEED.value,
            batch_size=BATCH_SIZE.value,
            single_files=SINGLE_FILES.value,
            out=OUT.value and Path(OUT.value),
        )


if __name__ == "__main__":
    app.run(main, flags_parser=terminal.parse_flags)
