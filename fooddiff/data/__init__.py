"""Images and labels, from a data set as it is published to batches on the devices.

    sources/ -> cache.py (-> latents.py) -> order.py -> feed.py

`sources` knows the layouts of data sets, `preprocess` is the one function from a picture to pixels, `cache`
decodes a split once into a memory-mapped array, `latents` does so with what an autoencoder makes of it, `order` says
which images step k trains on, and `feed` brings them to the devices. Nothing here knows models or diffusion.
"""
