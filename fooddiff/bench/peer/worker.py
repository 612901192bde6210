"""Runs in the peer's environment, never in ours: prepares what its argument says, then works once at every line.

It prints the seconds of each piece of work. The peer of a UNet is improved-diffusion, which needs neither `mpi4py` nor
an installation; that of a U-ViT is `uvit.py`.
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


def train_uvit(settings):
    """One step of the cheap recipe's network in PyTorch: x_0, min(SNR + 1, 5), AdamW, averages."""
    from uvit import UViT

    model = UViT(**settings["model"]).to(memory_format=torch.channels_last)
    params = list(model.parameters())
    if (count := sum(param.numel() for param in params)) != settings["parameters"]:
        raise ValueError(f"the peer has {count} parameters, ours {settings['parameters']}")
    averages = [[param.detach().clone() for param in params] for _ in range(settings["averages"])]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    n, size = settings["batch_size"], settings["model"]["image_size"]
    pixels = torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8)
    labels = torch.randint(0, settings["model"]["num_classes"], (n,))

    def step():
        x_0 = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # of NHWC, so channels last
        y = torch.where(torch.rand(n) < 0.1, settings["model"]["num_classes"], labels)
        time = (torch.arange(n) + torch.rand(n)) / n * 0.998 + 0.001
        log_snr = -2 * torch.log(torch.tan(torch.pi / 2 * time))
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        x_t = alpha[:, None, None, None] * x_0 + sigma[:, None, None, None] * torch.randn_like(x_0)
        error = ((model(x_t, log_snr, y) - x_0) ** 2).mean((1, 2, 3))
        optimizer.zero_grad()
        (error * (log_snr.exp() + 1).clamp(max=5)).mean().backward()
        torch.nn.utils.get_total_norm([param.grad for param in params]).item()
        optimizer.step()
        with torch.no_grad():
            for average in averages:
                torch._foreach_lerp_(average, params, 1e-3)

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
    work = {"train": train, "train_uvit": train_uvit, "sample": sample, "inception": inception}[given["task"]](given)
    for _ in sys.stdin:
        start = time.perf_counter()
        work()
        print(time.perf_counter() - start, flush=True)
