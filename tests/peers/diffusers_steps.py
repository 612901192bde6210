"""Runs in an environment with diffusers, never in ours: takes the steps of exported pipelines from given noise.

    python diffusers_steps.py FOLDER:IN.npz:OUT.npz ...

IN holds x_t [steps, n, c, h, w], noise of the same shape, y [n], steps and guidance; OUT what follows each x_t, the end
of a run from x_t[0] alone, and the class of the network.
"""

import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers import scheduling_ddpm


@torch.no_grad()
def follow(folder, given):
    """The steps of one pipeline."""
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    x_t, noise = torch.from_numpy(given["x_t"]), torch.from_numpy(given["noise"])
    y, steps, scale = given["y"].tolist(), int(given["steps"]), float(given["guidance"])
    ids, afterwards, x = pipe.label_ids(y), [], x_t[0]
    pipe.set_timesteps(steps)
    for i, t in enumerate(pipe.scheduler.timesteps):
        scheduling_ddpm.randn_tensor = lambda *_, drawn=noise[i], **__: drawn
        afterwards.append(pipe.scheduler.step(pipe.predict(x_t[i], t, ids, scale), t, x_t[i]).prev_sample)
        x = pipe.scheduler.step(pipe.predict(x, t, ids, scale), t, x).prev_sample
    drawn = iter(noise)
    scheduling_ddpm.randn_tensor = lambda *_, **__: next(drawn)
    sys.modules[type(pipe).__module__].randn_tensor = lambda *_, **__: x_t[0]
    images = pipe(y, num_inference_steps=steps, guidance_scale=scale, output_type="np").images
    return {
        "x_next": torch.stack(afterwards).numpy(),
        "end": x.numpy(),
        "images": images,
        "network": type(pipe.unet).__name__,
        "names": np.array([f"{name} {tuple(value.shape)}" for name, value in pipe.unet.state_dict().items()]),
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        folder, source, target = argument.split(":")
        np.savez(target, **follow(folder, np.load(source)))
