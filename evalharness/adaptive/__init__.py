"""An adaptive sweep: ratios are added where they decide something, and prompts are spent where something is undecided."""
