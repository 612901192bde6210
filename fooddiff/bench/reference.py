"""The peer's side of a benchmark: a process in an environment of its own, which does one piece of work at a word."""

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

WORKER = Path(__file__).parent / "peer" / "worker.py"


class Peer(NamedTuple):
    """Where the peer is.

    Attributes:
        python: the Python of an environment with its packages.
        checkout: openai/improved-diffusion; None where the peer is an installed package.
    """

    python: Path
    checkout: Path | None


@contextmanager
def started(peer: Peer, settings: Mapping[str, Any]) -> Iterator[Callable[[], float]]:
    """Starts the peer's process and ends it with the block.

    Args:
        peer: where it is.
        settings: what it prepares; see `peer/worker.py`.

    Yields:
        A task for `interleaved`.

    Raises:
        RuntimeError: the process ended; shows the end of what it said.
    """
    command = [peer.python, WORKER, json.dumps({"checkout": str(peer.checkout), **settings})]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as worker:

        def run() -> float:
            try:
                worker.stdin.write("go\n")
                worker.stdin.flush()
                return float(worker.stdout.readline())
            except (ValueError, OSError):
                raise RuntimeError(f"the peer's process ended: {worker.stderr.read()[-2000:]}") from None

        try:
            yield run
        finally:
            worker.kill()


def unet_settings(config) -> dict[str, Any]:
    """The arguments of the peer's UNet and diffusion that describe the same model as a config."""
    model, diffusion, size = config.model, config.diffusion, config.data.image_size
    learned = diffusion.variance == "learned_range"
    return {
        "image_size": size,
        "unet": {
            "in_channels": 3,
            "model_channels": model.model_channels,
            "out_channels": 6 if learned else 3,
            "num_res_blocks": model.num_res_blocks,
            "attention_resolutions": [size // resolution for resolution in model.attention_resolutions],
            "dropout": model.dropout,
            "channel_mult": list(model.channel_mult),
            "num_classes": model.num_classes,
            "num_heads": model.num_heads,
            "use_scale_shift_norm": model.scale_shift_norm,
        },
        "schedule": diffusion.schedule,
        "timesteps": diffusion.timesteps,
        "rescale_timesteps": diffusion.rescale_timesteps,
        "learned": learned,
    }
