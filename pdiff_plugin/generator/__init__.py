"""The generative model of weights: autoencoder, latent diffusion, samplers, and the file that holds them."""
