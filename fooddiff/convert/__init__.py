"""Weights from and to other programs: OpenAI's, Hugging Face's and any with JAX; autoencoders of others in."""
