"""From scores to the chosen ratio: metrics, tests, frontier, and what is lacking for a certificate."""
