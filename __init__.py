"""psacpo: a language model's helpfulness/safety balance as a dial, with evidence for where to set it."""

__version__ = "0.1.0"
