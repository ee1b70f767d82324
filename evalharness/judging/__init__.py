"""Judges at work: what is scored, stored, found again, and held against human labels."""
