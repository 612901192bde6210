"""Weights from and to other programs: OpenAI's `.pt` checkpoints in and out, safetensors out and in."""
