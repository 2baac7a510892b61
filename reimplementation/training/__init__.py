"""How a detector learns, and how well it has learnt."""
