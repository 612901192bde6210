"""Runs in the peer's environment, never in ours: prepares what its argument says, then works once at every line.

It prints the seconds of each piece of work. Of improved-diffusion it needs neither `mpi4py` nor an installation.
"""

import json
import sys
import time
import types

import torch


def train(settings):
    """One step as the peer's loop does it: loss, gradient and its norm, Adam, averages."""
    model, diffusion = model_and_diffusion(settings, respacing="")
    from improved_diffusion.nn import update_ema

    params = list(model.parameters())
    averages = {rate: [param.detach().clone() for param in params] for rate in settings["ema_rates"]}
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0)
    x, y = inputs(settings)

    def step():
        t = torch.randint(0, diffusion.num_timesteps, (len(x),))
        optimizer.zero_grad()
        diffusion.training_losses(model, x, t, model_kwargs={"y": y})["loss"].mean().backward()
        sum((param.grad**2).sum().item() for param in params)
        optimizer.step()
        for rate, average in averages.items():
            update_ema(average, params, rate=rate)

    return step


def sample(settings):
    """One batch of images, by the ancestral loop."""
    model, diffusion = model_and_diffusion(settings, respacing=str(settings["steps"]))
    x, y = inputs(settings)

    def draw():
        with torch.no_grad():
            diffusion.p_sample_loop(model, tuple(x.shape), model_kwargs={"y": y})

    return draw


def inception(settings):
    """Features of one batch by torch-fidelity, whose top level would need torchvision."""
    import importlib.util

    package = types.ModuleType("torch_fidelity")
    package.__path__ = importlib.util.find_spec("torch_fidelity").submodule_search_locations
    sys.modules["torch_fidelity"] = package
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", [settings["feature"]], feature_extractor_weights_path=settings["weights"]
    ).eval()
    shape = (settings["batch_size"], 3, settings["image_size"], settings["image_size"])
    x = torch.randint(0, 256, shape, dtype=torch.uint8)

    def extract():
        with torch.no_grad():
            network(x)[0].numpy()

    return extract


def model_and_diffusion(settings, *, respacing):
    """The peer's model, and its diffusion with the loss or the spacing that is asked for."""
    sys.path.insert(0, settings["checkout"])
    from improved_diffusion import script_util, unet

    arguments = settings["unet"] | {"attention_resolutions": tuple(settings["unet"]["attention_resolutions"])}
    model = unet.UNetModel(**arguments)
    diffusion = script_util.create_gaussian_diffusion(
        steps=settings["timesteps"],
        learn_sigma=settings["learned"],
        noise_schedule=settings["schedule"],
        rescale_timesteps=settings["rescale_timesteps"],
        rescale_learned_sigmas=True,
        timestep_respacing=respacing,
    )
    return model, diffusion


def inputs(settings):
    """A batch of noise and its labels."""
    x = torch.randn(settings["batch_size"], 3, settings["image_size"], settings["image_size"])
    classes = settings["unet"]["num_classes"]
    return x, None if classes is None else torch.randint(0, classes, (len(x),))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    work = {"train": train, "sample": sample, "inception": inception}[given["task"]](given)
    for _ in sys.stdin:
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, flush=True)
