"""Other people's models, before and after `integrations.accelerate`: which are run, how, and what is shown of it."""
