"""A tiny assistant world with a known truth, so that the whole job runs anywhere in about a minute."""

from psacpo.demo.project import write_project

__all__ = ["write_project"]
