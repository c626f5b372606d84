"""A Pyro model as an energy of its latent variables."""

__all__: list[str] = []
