"""Draws images with an exported model: noise, a network, a scheduler. Needs diffusers alone.

pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
images = pipe(["pizza", "sushi"], generator=torch.manual_seed(0)).images
"""

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class FooddiffPipeline(DiffusionPipeline):
    """A UNet in pixel space that knows classes, or none.

    Args:
        unet: predicts noise and, with twice the channels, its variance.
        scheduler: a DDPMScheduler draws as the model was trained to; others that take the same prediction fit, too.
        timestep_scale: what the network is fed is the timestep times this.
        id2label: the name of each class; None for a network that knows no classes.
        null_label: the class id that means none, for guidance; None if there is no such class.
    """

    def __init__(self, unet, scheduler, timestep_scale=1.0, id2label=None, null_label=None):
        """Takes the parts, as model_index.json names them."""
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(timestep_scale=timestep_scale, id2label=id2label, null_label=null_label)
        betas = torch.tensor(scheduler.config.trained_betas, dtype=torch.float64)
        scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)  # in float32, steps at low noise would lose three digits

    def label_ids(self, classes):
        """Class names or ids to a tensor of ids; None without classes."""
        if self.config.id2label is None:
            return None
        ids = {name: int(key) for key, name in self.config.id2label.items()}
        if unknown := [each for each in classes if each not in ids and each not in ids.values()]:
            raise ValueError(f"no class {unknown[0]!r}: the model knows {', '.join(ids)}")
        return torch.tensor([ids.get(each, each) for each in classes], device=self._execution_device)

    def set_timesteps(self, steps=None):
        """Spreads steps evenly from the first timestep to the last, as the model's own program; None takes all."""
        total = self.scheduler.config.num_train_timesteps
        if steps is None or not isinstance(self.scheduler, DDPMScheduler):
            self.scheduler.set_timesteps(steps or total)
            return
        if not 2 <= steps <= total:
            raise ValueError(f"num_inference_steps is {steps}, expected 2 to {total}")
        stride, position, kept = (total - 1) / (steps - 1), 0.0, []
        for _ in range(steps):
            kept.append(round(position))
            position += stride  # summed, not multiplied: halves round as they do there
        self.scheduler.set_timesteps(timesteps=kept[::-1])

    def predict(self, x_t, t, y, guidance_scale=1.0):
        """What the scheduler is to be given for images x_t at the integer timestep t."""
        time = torch.full((len(x_t),), float(t), device=x_t.device) * self.config.timestep_scale
        output = self.unet(x_t, time, class_labels=y).sample
        channels = x_t.shape[1]
        if guidance_scale != 1:
            if self.config.null_label is None:
                raise ValueError("guidance_scale must be 1: this model knows no label that means none")
            null = self.unet(x_t, time, class_labels=torch.full_like(y, self.config.null_label)).sample
            guided = null[:, :channels] + guidance_scale * (output[:, :channels] - null[:, :channels])
            output = torch.cat([guided, output[:, channels:]], dim=1)
        return output if isinstance(self.scheduler, DDPMScheduler) else output[:, :channels]

    @torch.no_grad()
    def __call__(
        self, classes, num_inference_steps=None, guidance_scale=1.0, generator=None, output_type="pil", return_dict=True
    ):
        """Draws one image for every entry of `classes`.

        Args:
            classes: class names or ids; for a network without classes, any list of the wanted length.
            num_inference_steps: None takes every timestep.
            guidance_scale: 1 is off.
            generator: of the noise.
            output_type: "pil", "np" or "pt".
            return_dict: whether to return an ImagePipelineOutput or a tuple.
        """
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        shape = (len(classes), channels, size, size)
        x_t = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        y = self.label_ids(classes)
        self.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            output = self.predict(x_t, t, y, guidance_scale)
            extra = {"generator": generator} if isinstance(self.scheduler, DDPMScheduler) else {}
            x_t = self.scheduler.step(output, t, x_t, **extra).prev_sample
        images = (x_t / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
