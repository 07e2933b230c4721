"""The page that shows one image going through one training step: python -m tools.explain RUN."""
